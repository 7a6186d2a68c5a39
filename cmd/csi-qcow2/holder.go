package main

import (
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
)

func newHolderCommand() *cobra.Command {
	var o holder.Options
	cmd := &cobra.Command{
		Use:   "holder",
		Short: "Keep the block devices of volumes while the engine restarts",
		Long: `Keep the descriptors of the block devices that an engine with --holder serves. While the engine, or one of its
workers, is dead or replaced, pods wait instead of getting I/O errors.

On SIGTERM it stays until a holder that was started on the same socket has taken over, or no volume is
attached. When it is killed, the pods get I/O errors.`,
		Example: `  csi-qcow2 holder --socket /run/csi-qcow2/holder.sock`,
		Args:    takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer klog.Flush()
			protectMemory()
			return holder.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Socket, "socket", "", "`path` of the socket to listen on")
	cmd.Flags().DurationVar(&o.Patience, "patience", 10*time.Minute,
		"how long pods wait at most while no engine runs, before they get I/O errors; 0: for ever")
	require(cmd, "socket")
	addLogFlags(cmd)
	return cmd
}

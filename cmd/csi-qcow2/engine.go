package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
)

func newEngineCommand() *cobra.Command {
	var o engine.Options
	var metrics metricsServer
	var readyFile string
	cmd := &cobra.Command{
		Use:   "engine",
		Short: "Serve the block devices of attached volumes",
		Long: `Serve the attached volumes of a pool as block devices, one worker process each, until SIGTERM or SIGINT.
Pods do their I/O through this process. With --holder it can be restarted, killed or replaced at any time:
the volumes are left to the next engine, and pods wait for it. One that is started beside another waits
for that one to end. Without --holder the volumes are detached at its end, and those in use fail.

It waits for the pool: a directory without pool.json is a disk that is not mounted yet. A pool of another node,
and the copy of a pool, are refused until "pool adopt" or "pool init --new-uuid" says what they are.`,
		Example: `  csi-qcow2 engine --listen unix:///run/csi-qcow2/engine.sock --pool /var/lib/csi-qcow2/pool \
    --holder /run/csi-qcow2/holder.sock`,
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer klog.Flush()
			protectMemory()
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Version = version
			o.Ready = func() { markReady(readyFile) }
			o.WorkerCommand = append([]string{self, "worker"}, logFlags(cmd)...)
			return metrics.run(cmd.Context(), func(r prometheus.Registerer) error {
				o.Metrics = r
				return engine.Run(cmd.Context(), o)
			})
		},
	}
	cmd.Flags().StringVar(&o.Listen, "listen", "", "`endpoint` of the control API, unix:///path")
	cmd.Flags().StringVar(&o.PoolDir, "pool", "", "`directory` of the volumes")
	cmd.Flags().StringVar(&o.NodeID, "node-id", "", "`name` of the Kubernetes node: a pool of another one is refused")
	cmd.Flags().StringVar(&o.Holder, "holder", "", "`path` of the socket of a running holder")
	cmd.Flags().DurationVar(&o.IOTimeout, "io-timeout", time.Minute,
		"how long a volume's users wait for a worker that does not start, before they get I/O errors")
	cmd.Flags().StringVar(&readyFile, "ready-file", "", "`path` of a file to create when volumes are served, or could be taken over")
	addJournalFlag(cmd, &o.Journal)
	metrics.addFlag(cmd)
	require(cmd, "listen", "pool")
	addLogFlags(cmd)
	return cmd
}

// markReady tells whoever looks for the file that the engine does its work.
func markReady(path string) {
	if path == "" {
		return
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		klog.ErrorS(err, "Cannot say that the engine is ready")
	}
}

// newWorkerCommand is what the engine starts for each attached volume.
func newWorkerCommand() *cobra.Command {
	var o worker.Options
	cmd := &cobra.Command{
		Use:    "worker",
		Short:  "Serve one volume (the engine starts this)",
		Hidden: true,
		Args:   takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer klog.Flush()
			protectMemory()
			limitMemory(workerMemoryLimit)
			o.Rest = unmapProgram
			return worker.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.PoolDir, "pool", "", "`directory` of the volumes")
	cmd.Flags().StringVar(&o.Volume, "volume", "", "`ID` of the volume")
	cmd.Flags().StringVar(&o.Holder, "holder", "", "`path` of the holder's socket")
	addJournalFlag(cmd, &o.Journal)
	require(cmd, "pool", "volume", "holder")
	addLogFlags(cmd)
	return cmd
}

// newHelperCommand is what the engine starts to do what may have to wait for a volume.
func newHelperCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "helper",
		Short:  "Freeze and thaw a file system (the engine starts this)",
		Hidden: true,
		Args:   takes(),
		RunE: func(*cobra.Command, []string) error {
			protectMemory()
			return helper.Run()
		},
	}
}

// addJournalFlag adds what only tests of newer kernels need.
func addJournalFlag(cmd *cobra.Command, journal *bool) {
	cmd.Flags().BoolVar(journal, "journal", false, "keep unanswered requests as on a kernel before 6.9")
	_ = cmd.Flags().MarkHidden("journal") // there is such a flag
}

// require makes flags of cmd, which it must have, mandatory.
func require(cmd *cobra.Command, flags ...string) {
	cmd.PreRunE = func(*cobra.Command, []string) error {
		var missing []string
		for _, name := range flags {
			if !cmd.Flags().Changed(name) {
				missing = append(missing, "--"+name)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		return wrongUsage(cmd, fmt.Errorf("%s must be given (see %s --help)", strings.Join(missing, ", "), cmd.CommandPath()))
	}
}

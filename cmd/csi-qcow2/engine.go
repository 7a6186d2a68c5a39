package main

import (
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

func newEngineCommand() *cobra.Command {
	var o engine.Options
	var metrics metricsServer
	cmd := &cobra.Command{
		Use:   "engine",
		Short: "Serve the block devices of attached volumes",
		Long: `Serve the attached volumes of a pool as block devices, one worker process each, until SIGTERM or SIGINT.
Pods do their I/O through this process: restart the plugin ("node") as you like, but this one only when no
volume is in use.

It waits for the pool: a directory without pool.json is a disk that is not mounted yet.`,
		Example: `  csi-qcow2 engine --listen unix:///run/csi-qcow2/engine.sock --pool /var/lib/csi-qcow2/pool`,
		Args:    takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer klog.Flush()
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Version = version
			o.WorkerCommand = append([]string{self, "worker"}, logFlags(cmd)...)
			return metrics.run(cmd.Context(), func(r prometheus.Registerer) error {
				o.Metrics = r
				return engine.Run(cmd.Context(), o)
			})
		},
	}
	cmd.Flags().StringVar(&o.Listen, "listen", "", "`endpoint` of the control API, unix:///path")
	cmd.Flags().StringVar(&o.PoolDir, "pool", "", "`directory` of the volumes")
	metrics.addFlag(cmd)
	require(cmd, "listen", "pool")
	addLogFlags(cmd)
	return cmd
}

// newWorkerCommand is what the engine starts for each attached volume.
func newWorkerCommand() *cobra.Command {
	var pool, volume string
	cmd := &cobra.Command{
		Use:    "worker",
		Short:  "Serve one volume (the engine starts this)",
		Hidden: true,
		Args:   takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer klog.Flush()
			return engine.RunWorker(cmd.Context(), pool, volume)
		},
	}
	cmd.Flags().StringVar(&pool, "pool", "", "`directory` of the volumes")
	cmd.Flags().StringVar(&volume, "volume", "", "`ID` of the volume")
	require(cmd, "pool", "volume")
	addLogFlags(cmd)
	return cmd
}

// require makes flags of cmd, which it must have, mandatory.
func require(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // there is no such flag
		}
	}
}

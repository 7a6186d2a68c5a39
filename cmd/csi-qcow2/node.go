package main

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

func newNodeCommand() *cobra.Command {
	var engineEndpoint string
	var inCluster bool
	var metrics metricsServer
	o := driver.Options{Version: version}
	reserve, overcommit := sizeFlag(driver.DefaultReserve), ratioFlag(driver.DefaultOvercommit)
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Serve the CSI plugin of one node",
		Long: `Serve CSI's Identity, Controller and Node services for the volumes of one node, until SIGTERM or SIGINT.
It holds no state and carries no pod's I/O: it can be stopped and started at any moment. It formats and mounts
file systems, so it must run as root and in the mount namespace where kubelet sees its mounts.`,
		Example: `  csi-qcow2 node --endpoint unix:///run/csi-qcow2/csi.sock --node-id "$(hostname)" \
      --pool /var/lib/csi-qcow2/pool --engine unix:///run/csi-qcow2/engine.sock`,
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			defer klog.Flush()
			client, err := engine.NewClient(engineEndpoint)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, client.Close()) }()
			o.Engine, o.Reserve, o.Overcommit = client, int64(reserve), float64(overcommit)
			if inCluster {
				if o.Cluster, err = rest.InClusterConfig(); err != nil {
					return err
				}
			}
			return metrics.run(cmd.Context(), func(r prometheus.Registerer) error {
				o.Metrics = r
				return driver.Run(cmd.Context(), o)
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Endpoint, "endpoint", "", "`endpoint` of the CSI services, unix:///path")
	flags.StringVar(&o.NodeID, "node-id", "", "`name` of the Kubernetes node")
	flags.StringVar(&o.PoolDir, "pool", "", "`directory` of the volumes")
	flags.StringVar(&engineEndpoint, "engine", "", "`endpoint` of the engine, unix:///path")
	flags.Var(&reserve, "reserve", "space of the pool's file system that is promised to no volume")
	flags.Var(&overcommit, "overcommit", "bytes promised to volumes for each free byte")
	flags.Int64Var(&o.SnapshotLimit, "snapshot-limit", driver.DefaultSnapshotLimit,
		"`percent` of a volume's size that its snapshots may keep, if its StorageClass says nothing")
	flags.Int64Var(&o.MaxVolumes, "max-volumes-per-node", 256, "`number` of volumes in use at once for which the scheduler takes the node; 0: any")
	flags.BoolVar(&inCluster, "cluster", false, `take part in the Kubernetes cluster of this pod, with its service account: volumes made from a
source and pre-provisioned snapshots are handled by the node that has their source`)
	metrics.addFlag(cmd)
	require(cmd, "endpoint", "node-id", "pool", "engine")
	addLogFlags(cmd)
	return cmd
}

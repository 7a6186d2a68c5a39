package main

import (
	"fmt"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

func newPoolCommand() *cobra.Command {
	return newGroup("pool", "Prepare and look at the directory that holds a node's volumes",
		`A pool is a directory, best the root of a file system of its own, that holds a node's volumes. XFS or btrfs
let restores and clones share blocks with their source.`,
		newPoolInitCommand(), newPoolAdoptCommand(), newPoolStatusCommand())
}

func newPoolInitCommand() *cobra.Command {
	var requireMount, newUUID bool
	var node string
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Make a directory a pool",
		Long: `Make a directory, which is empty or does not exist yet, a pool by writing pool.json into it. What is a pool
already is left as it is.

The engine and the CSI plugin work only in a directory that has this file: the mount point of a disk that is
not mounted is just an empty directory, in which no volume is missed and none created. For a pool on a disk of its
own, --require-mount keeps this command, too, from taking that directory.

A pool belongs to the node that uses it first, or that --node-id names, and a copy of it is refused everywhere.
--new-uuid makes a copy, with a machine or with its directory, a pool of its own: its volumes keep their content,
names and snapshots and get new IDs. PersistentVolumes go on meaning those of the original. No engine may serve it
meanwhile.`,
		Example: `  csi-qcow2 pool init /var/lib/csi-qcow2/pool
  csi-qcow2 pool init --new-uuid /mnt/copy/pool`,
		Args: takes("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if requireMount {
				if err := checkMountPoint(args[0]); err != nil {
					return err
				}
			}
			prepare := pool.InitOn
			if newUUID {
				prepare = pool.Renew
			}
			if err := prepare(args[0], node); err != nil {
				return err
			}
			return printPool(cmd, args[0])
		},
	}
	cmd.Flags().StringVar(&node, "node-id", "", "`name` of the Kubernetes node that a new pool belongs to (default the first that uses it)")
	cmd.Flags().BoolVar(&newUUID, "new-uuid", false, "make a copy of a pool a pool of its own")
	cmd.Flags().BoolVar(&requireMount, "require-mount", false, "refuse a directory that nothing is mounted at")
	return cmd
}

func newPoolAdoptCommand() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "adopt DIR",
		Short: "Let a pool belong to another node",
		Long: `Let a pool belong to the node that uses it next, or that --node-id names, after its disk has moved to another
node, its node was renamed, or its directory was restored from a backup. The volumes keep their IDs, so the pool
must not be in use anywhere else: for a second one of the same, see "pool init --new-uuid".`,
		Example: `  csi-qcow2 pool adopt /var/lib/csi-qcow2/pool`,
		Args:    takes("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := pool.Adopt(args[0], node); err != nil {
				return err
			}
			return printPool(cmd, args[0])
		},
	}
	cmd.Flags().StringVar(&node, "node-id", "", "`name` of the Kubernetes node (default the first that uses it)")
	return cmd
}

func printPool(cmd *cobra.Command, dir string) error {
	p, err := pool.Open(dir)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is pool %s\n", p.Dir(), p.UUID())
	return err
}

// checkMountPoint returns an error if dir is not a mount point.
func checkMountPoint(dir string) error {
	mounted, err := mountinfo.Mounted(dir)
	if err == nil && !mounted {
		err = fmt.Errorf("nothing is mounted at %s", dir)
	}
	return err
}

package main

import (
	"fmt"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

func newPoolCommand() *cobra.Command {
	return newGroup("pool", "Prepare the directory that holds a node's volumes",
		`A pool is a directory, best the root of a file system of its own, that holds a node's volumes. XFS or btrfs
let restores and clones share blocks with their source.`,
		newPoolInitCommand())
}

func newPoolInitCommand() *cobra.Command {
	var requireMount bool
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Make a directory a pool",
		Long: `Make a directory, which is empty or does not exist yet, a pool by writing pool.json into it. What is a pool
already is left as it is.

The engine and the CSI plugin work only in a directory that has this file: the mount point of a disk that is
not mounted is just an empty directory, in which no volume is missed and none created. For a pool on a disk of its
own, --require-mount keeps this command, too, from taking that directory.`,
		Example: `  csi-qcow2 pool init /var/lib/csi-qcow2/pool`,
		Args:    takes("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if requireMount {
				if err := checkMountPoint(args[0]); err != nil {
					return err
				}
			}
			if err := pool.Init(args[0]); err != nil {
				return err
			}
			p, err := pool.Open(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is pool %s\n", p.Dir(), p.UUID())
			return err
		},
	}
	cmd.Flags().BoolVar(&requireMount, "require-mount", false, "refuse a directory that nothing is mounted at")
	return cmd
}

// checkMountPoint returns an error if dir is not a mount point.
func checkMountPoint(dir string) error {
	mounted, err := mountinfo.Mounted(dir)
	if err == nil && !mounted {
		err = fmt.Errorf("nothing is mounted at %s", dir)
	}
	return err
}

package main

import (
	"fmt"

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
	return &cobra.Command{
		Use:   "init DIR",
		Short: "Make a directory a pool",
		Long: `Make a directory, which is empty or does not exist yet, a pool by writing pool.json into it. What is a pool
already is left as it is.

The engine and the CSI plugin work only in a directory that has this file: the mount point of a disk that is
not mounted is just an empty directory, in which no volume is missed and none created.`,
		Example: `  csi-qcow2 pool init /var/lib/csi-qcow2/pool`,
		Args:    takes("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
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
}

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newRootCommand() *cobra.Command {
	root := newGroup("csi-qcow2", "Kubernetes volumes that are qcow2 images, with internal snapshots",
		`csi-qcow2 turns a directory of a node into Kubernetes volumes. Each volume is one qcow2 image, each
VolumeSnapshot an internal snapshot of it.

On a node run "holder", which keeps the block devices, "engine", which serves them, and "node", the CSI
plugin, on one pool.
For administrators there are "pool", "volume" and "image"; an image that is not attached can also be handled
with QEMU's own tools at any time.`,
		newNodeCommand(), newEngineCommand(), newHolderCommand(), newPoolCommand(), newVolumeCommand(), newImageCommand(), newDemoCommand(), newWorkerCommand(),
		newHelperCommand(), newVersionCommand(), newManCommand())
	root.Version = version
	root.SilenceErrors = true // exitStatus prints them
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var invalid *pflag.InvalidValueError
		if errors.As(err, &invalid) {
			err = fmt.Errorf("--%s: %w", invalid.GetFlag().Name, errors.Unwrap(invalid))
		}
		return wrongUsage(cmd, fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath()))
	})
	root.SetVersionTemplate("csi-qcow2 {{.Version}}\n")
	root.SetHelpFunc(printHelp)
	addCompletions(root)
	return root
}

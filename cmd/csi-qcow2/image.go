package main

import (
	"github.com/spf13/cobra"
)

func newImageCommand() *cobra.Command {
	image := newGroup("image", "Work on a qcow2 image",
		`Create, look at, check, convert and snapshot qcow2 images, versions 2 and 3. An image that QEMU or the
engine has open is refused, by who has it. What only looks, "info", "map" and "snapshot list", and the export of a
snapshot, also works on the image of an attached volume, and with -U on any.

Sizes are decimal numbers of bytes, or have a suffix K, M, G, T, P (powers of 1024, also written GiB), then also
with a fraction; 0x… is hexadecimal.
Snapshots are meant by their name, and by nothing else: with --id, what is given is an ID (QEMU looks at IDs
first, then at names).

What makes a new file gives it its name when it is whole: a run that fails or is killed leaves no such file.`,
		newImageCreateCommand(), newImageInfoCommand(), newImageMapCommand(), newImageResizeCommand(),
		newImageCheckCommand(), newImageCompactCommand(), newImageCloneCommand(), newImageExportCommand(), newImageImportCommand(), newImageSnapshotCommand(), newImageIOCommand())
	image.Example = `  csi-qcow2 image create disk.qcow2 10G
  csi-qcow2 image import disk.raw disk.qcow2
  csi-qcow2 image snapshot create disk.qcow2 before-upgrade
  csi-qcow2 image snapshot goto disk.qcow2 before-upgrade
  csi-qcow2 image check disk.qcow2`
	return image
}

package driver

import (
	"github.com/container-storage-interface/spec/lib/go/csi"
)

const (
	fsExt3    = "ext3"
	fsExt4    = "ext4"
	fsXFS     = "xfs"
	defaultFS = fsExt4
)

// checkFSType refuses file systems that this driver does not make. btrfs is one: a restored volume
// has its source's UUID, and not every kernel mounts the two beside each other.
func checkFSType(fs string) error {
	switch fs {
	case "", fsExt3, fsExt4, fsXFS:
		return nil
	}
	return invalid("file system %q; it can be ext4, ext3 or xfs", fs)
}

// checkCapabilities refuses a request whose capabilities no volume of this driver has.
func checkCapabilities(caps []*csi.VolumeCapability) error {
	if len(caps) == 0 {
		return invalid("volume capabilities are missing")
	}
	for _, c := range caps {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

func checkCapability(c *csi.VolumeCapability) error {
	if c == nil {
		return invalid("volume capability is missing")
	}
	switch c.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
	case csi.VolumeCapability_AccessMode_UNKNOWN:
		return invalid("access mode is missing")
	default:
		return invalid("access mode %s: a volume lives on one node", c.GetAccessMode().GetMode())
	}
	switch {
	case c.GetBlock() != nil:
		return nil
	case c.GetMount() == nil:
		return invalid("access type is missing")
	case c.GetMount().GetVolumeMountGroup() != "":
		return invalid("volume_mount_group is not supported")
	}
	for option := range eachOption(c.GetMount().GetMountFlags()) {
		if err := checkMountOption(option); err != nil {
			return err
		}
	}
	return checkFSType(c.GetMount().GetFsType())
}

// isReadOnly tells whether nobody may write a volume with this capability.
func isReadOnly(c *csi.VolumeCapability) bool {
	if c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY {
		return true
	}
	for option := range eachOption(c.GetMount().GetMountFlags()) {
		if option == "ro" {
			return true
		}
	}
	return false
}

// oneTarget tells whether a volume with this access mode may be published at one path only.
func oneTarget(c *csi.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
}

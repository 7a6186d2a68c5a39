package driver

import (
	"iter"
	"strings"

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

// checkMountOption refuses those that mount something else than the volume, elsewhere, or for others, and those that let the
// volume's content end the node. What is left is the file system's to judge.
func checkMountOption(option string) error {
	name, value, _ := strings.Cut(strings.TrimSpace(option), "=")
	switch name {
	case "bind", "rbind", "move", "remount", "loop", "offset", "sizelimit", "encryption", "journal_dev", "journal_path", "logdev", "rtdev",
		"shared", "rshared", "private", "rprivate", "slave", "rslave", "unbindable", "runbindable",
		"user", "users", "owner", "group", "helper", "uhelper", "abort", "test_dummy_encryption":
		return invalid("mount option %q is not allowed", name)
	case "errors":
		if value == "panic" {
			return invalid("mount option %q is not allowed: what a pod writes could stop the node", option)
		}
	}
	if strings.HasPrefix(name, "X-mount.") || strings.HasPrefix(name, "verity.") {
		return invalid("mount option %q is not allowed", name)
	}
	return nil
}

// eachOption yields the options of mount flags, each of which may hold several.
func eachOption(flags []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, flag := range flags {
			for option := range strings.SplitSeq(flag, ",") {
				if !yield(option) {
					return
				}
			}
		}
	}
}

// mountOptions returns the options for the staged mount. readOnly is for a volume that nobody may write.
func mountOptions(c *csi.VolumeCapability) (options []string, readOnly bool) {
	options = c.GetMount().GetMountFlags()
	readOnly = c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	for option := range eachOption(options) {
		readOnly = readOnly || option == "ro"
	}
	return options, readOnly
}

// oneTarget tells whether a volume with this access mode may be published at one path only.
func oneTarget(c *csi.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
}

package driver

import (
	"iter"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// mountOptions returns what mount(8) gets for a volume: what a StorageClass's or a PersistentVolume's mountOptions may replace, these,
// and what nobody may. Of two that contradict each other the later one counts.
func mountOptions(c *csi.VolumeCapability, fsType string) string {
	var options []string
	if isExt(fsType) {
		// What the superblock says, which a tenant may have written, could be to stop the node.
		options = append(options, "errors=remount-ro")
	}
	options = append(options, c.GetMount().GetMountFlags()...)
	options = append(options, "defaults")
	if isReadOnly(c) {
		options = append(options, "ro")
	}
	if fsType == fsXFS {
		options = append(options, "nouuid") // a restored volume has its source's UUID
	}
	return strings.Join(options, ",")
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

package driver

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/mount-utils"
)

// stagedFS is the file system that a volume gets.
func stagedFS(c *csi.VolumeCapability, p volumeParameters) string {
	return cmp.Or(c.GetMount().GetFsType(), p.fsType, defaultFS)
}

// formatOptions: an image that is blank has nothing to discard.
func formatOptions(fsType string) []string {
	if fsType == fsXFS {
		return []string{"-K"}
	}
	return []string{"-E", "nodiscard"}
}

// formatAndMount mounts a device. One that is blank is formatted first, and only such a one; any other is checked,
// and repaired if that is safe.
func (n *node) formatAndMount(device, path, fsType string, options []string, readOnly bool) error {
	format, err := n.mounter.GetDiskFormat(device)
	if err != nil {
		return fmt.Errorf("look for a file system on %s: %w", device, err)
	}
	if format != "" && format != fsType {
		return fmt.Errorf("%w: the volume holds %s, not %s", errPrecondition, format, fsType)
	}
	options = slices.Clone(options)
	if readOnly {
		options = append(options, "ro")
	}
	if fsType == fsXFS {
		options = append(options, "nouuid") // a restored volume has its source's UUID
	}
	return n.mounter.FormatAndMountSensitiveWithFormatOptions(device, path, fsType, options, nil, formatOptions(fsType))
}

// growFileSystem makes a mounted file system as large as its device. It does nothing to one that is.
func (n *node) growFileSystem(device, path string) error {
	resizer := mount.NewResizeFs(n.mounter.Exec)
	needed, err := resizer.NeedResize(device, path)
	if err != nil {
		return fmt.Errorf("compare the file system at %s with %s: %w", path, device, err)
	}
	if !needed {
		return nil
	}
	if _, err := resizer.Resize(device, path); err != nil {
		return fmt.Errorf("grow the file system at %s: %w", path, err)
	}
	return nil
}

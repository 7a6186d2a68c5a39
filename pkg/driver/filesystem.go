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
func (n *node) formatAndMount(device blockDevice, path, fsType string, options []string, readOnly bool) error {
	format, err := n.mounter.GetDiskFormat(device.path)
	if err != nil {
		return fmt.Errorf("look for a file system on %s: %w", device.path, err)
	}
	if format != "" && format != fsType {
		return fmt.Errorf("%w: the volume holds %s, not %s", errPrecondition, format, fsType)
	}
	if format == "" && readOnly {
		return fmt.Errorf("%w: the volume is blank, and read-only", errPrecondition)
	}
	if isExt(format) && !readOnly {
		grow, err := extMustGrowUnmounted(device)
		if err == nil && grow {
			err = n.growUnmountedExt(device)
		}
		if err != nil {
			return err
		}
	}
	options = slices.Clone(options)
	if readOnly {
		options = append(options, "ro")
	}
	if fsType == fsXFS {
		options = append(options, "nouuid") // a restored volume has its source's UUID
	}
	return n.mounter.FormatAndMountSensitiveWithFormatOptions(device.path, path, fsType, options, nil, formatOptions(fsType))
}

// growFileSystem makes a mounted file system as large as its device. It does nothing to one that is.
func (n *node) growFileSystem(device blockDevice, m mountPoint) error {
	if isExt(m.fsType) {
		cannot, err := extMustGrowUnmounted(device)
		if err != nil {
			return err
		}
		if cannot {
			return fmt.Errorf("%w: without CAP_SYS_RESOURCE the plugin can grow %s only when it is staged the next time",
				errPrecondition, m.fsType)
		}
	}
	if _, err := mount.NewResizeFs(n.mounter.Exec).Resize(device.path, m.path); err != nil {
		return fmt.Errorf("grow the file system at %s: %w", m.path, err)
	}
	return nil
}

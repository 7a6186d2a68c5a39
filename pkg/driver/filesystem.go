package driver

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/mount-utils"
)

// stagedFS is the file system that a volume gets.
func stagedFS(c *csi.VolumeCapability, p volumeParameters) string {
	return cmp.Or(c.GetMount().GetFsType(), p.fsType, defaultFS)
}

// mountDevice mounts a device that holds a file system.
func (n *node) mountDevice(device blockDevice, path, fsType string, options []string, readOnly bool) error {
	options = append(slices.Clone(options), "defaults")
	if readOnly {
		options = append(options, "ro")
	}
	if fsType == fsXFS {
		options = append(options, "nouuid") // a restored volume has its source's UUID
	}
	return n.mounter.Mount(device.path, path, fsType, options)
}

// checkFileSystem mends what is safe to mend in a file system that is not mounted, and lets it grow if it cannot while it
// is. XFS does so when it is mounted.
func (n *node) checkFileSystem(ctx context.Context, device blockDevice, fsType string) error {
	if !isExt(fsType) {
		return nil
	}
	if grow, err := extMustGrowUnmounted(device); err != nil || grow {
		return cmp.Or(err, n.growUnmountedExt(device))
	}
	o, err := n.programs.run(ctx, "e2fsck", "-p", device.path)
	if err == nil && o.status&fsckUncorrected != 0 {
		err = fmt.Errorf("the file system has errors that are not safe to mend unasked: %w", o.err())
	}
	return err // other failures of the check are the mount's to judge
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

package driver

import (
	"cmp"
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"
)

// stagedFS is the file system that a volume gets.
func stagedFS(c *csi.VolumeCapability, p volumeParameters) string {
	return cmp.Or(c.GetMount().GetFsType(), p.fsType, defaultFS)
}

// mountDevice mounts a device that holds a file system.
func (n *node) mountDevice(device blockDevice, path, fsType, options string) error {
	return n.programs.mustRun(program{
		device: device.path, limit: quick, visible: true,
		command: []string{"mount", "-t", fsType, "-o", options, device.path, path},
	})
}

// checkFileSystem mends what is safe to mend in a file system that is not mounted, and lets it grow if it cannot while it
// is. XFS does so when it is mounted.
func (n *node) checkFileSystem(ctx context.Context, device blockDevice, fsType string, readOnly bool) error {
	if !isExt(fsType) {
		return nil
	}
	if err := refuseForeignJournal(device); err != nil || readOnly {
		return err
	}
	check := []string{"e2fsck", "-p", device.path}
	grow, err := extMustGrowUnmounted(device)
	if err != nil {
		return err
	}
	if grow { // resize2fs wants all of it checked
		check = []string{"e2fsck", "-f", "-p", device.path}
	}
	o, err := n.programs.run(program{device: device.path, limit: thorough, command: check})
	if err == nil && o.status&(fsckUncorrected|fsckFailed) == fsckUncorrected {
		err = fmt.Errorf("the file system has errors that are not safe to mend unasked: %w", o.err())
	}
	if err != nil || !grow { // other failures of the check are the mount's to judge
		return err
	}
	err = n.programs.mustRun(program{device: device.path, limit: thorough, command: []string{"resize2fs", device.path}})
	if err != nil { // it is usable as it is; the next staging tries again
		klog.FromContext(ctx).Error(err, "The file system does not grow", "device", device.path)
	}
	return nil
}

// growFileSystem makes a mounted file system as large as its device. It does nothing to one that is.
func (n *node) growFileSystem(device blockDevice, m mountPoint) error {
	command := []string{"xfs_growfs", "-d", scratch}
	if isExt(m.fsType) {
		cannot, err := extMustGrowUnmounted(device)
		if err != nil {
			return err
		}
		if cannot {
			return refuse(errPrecondition, "without CAP_SYS_RESOURCE the plugin can grow %s only when it is staged the next time", m.fsType)
		}
		command = []string{"resize2fs", device.path}
	}
	err := n.programs.mustRun(program{device: device.path, limit: thorough, mounted: m.path, command: command})
	if err != nil {
		err = fmt.Errorf("grow the file system at %s: %w", m.path, err)
	}
	return err
}

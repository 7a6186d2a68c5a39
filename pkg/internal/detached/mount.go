// Package detached mounts file systems nowhere.
package detached

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Mount makes a mount that is attached to no mount namespace and returns a descriptor of its root, which is the caller's. It is
// gone when that and all files opened through it are closed.
func Mount(fsType string, values map[string]string, flags ...string) (int, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", fsType, err)
	}
	defer unix.Close(fs)
	for k, v := range values {
		if err := unix.FsconfigSetString(fs, k, v); err != nil {
			return -1, fmt.Errorf("fsconfig %s %s=%s: %w", fsType, k, v, err)
		}
	}
	for _, k := range flags {
		if err := unix.FsconfigSetFlag(fs, k); err != nil {
			return -1, fmt.Errorf("fsconfig %s %s: %w", fsType, k, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("create %s: %w", fsType, err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsmount %s: %w", fsType, err)
	}
	return mount, nil
}

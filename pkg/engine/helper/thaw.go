package helper

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/detached"
)

// What is in this file runs in a helper.

// refreezePause is how often a freeze that is not complete is looked at on kernels that do not wait for it.
const refreezePause = 100 * time.Millisecond

// thawDevice thaws the file system that is mounted from device, wherever that is. The mount may be in
// a mount namespace that we cannot see, or there may be none left: a second mount of a device shares the superblock of the
// first: a detached one, which no namespace shows, gives us a directory for FITHAW.
func thawDevice(device string, surely bool) error {
	// Nothing is frozen on a device that nobody has claimed, and nothing is to be mounted from it.
	claimed, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		return unix.Close(claimed)
	}
	if !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("open %s: %w", device, err)
	}
	mount, err := detachedMount(device)
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	root, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the root of %s: %w", device, err)
	}
	defer unix.Close(root)
	if err := thawRoot(root, surely); err != nil {
		return fmt.Errorf("thaw %s: %w", device, err)
	}
	return nil
}

// thawRoot thaws the file system of a directory. FITHAW has the same error for a file system that is not frozen and for one
// whose freeze has begun and waits for a writer. The latter cannot be ended, only waited for: another freeze does so, or has
// come before it, and is thawed at once.
func thawRoot(root int, surely bool) error {
	for {
		err := unix.IoctlSetInt(root, fiThaw, 0)
		if !surely && errors.Is(err, unix.EINVAL) {
			return nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
		err = unix.IoctlSetInt(root, fiFreeze, 0)
		switch {
		case err == nil:
			surely = false
		case errors.Is(err, unix.EBUSY):
			<-time.After(refreezePause)
		default:
			return nil // it cannot be frozen, so it is not
		}
	}
}

// detachedMount mounts a device that is mounted already without attaching it anywhere; the mount ends when the descriptor is
// closed.
func detachedMount(device string) (int, error) {
	var failures []error
	for _, fsType := range []string{"ext4", "xfs", "ext3"} {
		for _, flags := range [][]string{nil, {"ro"}} { // as it is mounted, else EBUSY
			mount, err := detached.Mount(fsType, map[string]string{"source": device}, flags...)
			if err == nil {
				return mount, nil
			}
			failures = append(failures, err)
		}
	}
	return -1, errors.Join(failures...)
}

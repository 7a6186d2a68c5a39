package driver

import (
	"context"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// mountedFileSystem opens a directory of the file system that is mounted here from an attached volume, for
// the engine to freeze it by; nil if there is none that can be written. engine.ErrNotAttached.
func (d *Driver) mountedFileSystem(ctx context.Context, id string) (*os.File, error) {
	a, err := d.engine.Attachment(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := a.Err(); err != nil {
		return nil, err
	}
	device, err := servedDevice(a)
	if err != nil {
		return nil, err
	}
	defer device.close()
	at, err := device.fileSystemMounts()
	if err != nil {
		return nil, err
	}
	at = slices.DeleteFunc(at, func(m mountPoint) bool { return m.superRO })
	for _, m := range at {
		dir, err := openMount(m)
		if err != nil || dir != nil {
			return dir, err
		}
	}
	return nil, nil //nolint:nilnil // nothing to freeze
}

// openMount opens a mount's directory; nil if something else is mounted over it, which is not touched: it may be a pod's, whose
// server never answers. It is no more than a path (O_PATH): to open it may have to wait for the volume.
func openMount(m mountPoint) (*os.File, error) {
	if top, err := mountAt(m.path); err != nil || top == nil || top.dev != m.dev {
		return nil, err
	}
	dir, err := os.OpenFile(m.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a mounted volume to freeze it: %w", err)
	}
	var st unix.Statx_t
	err = unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if err != nil || unix.Mkdev(st.Dev_major, st.Dev_minor) != m.dev {
		_ = dir.Close()
		return nil, err
	}
	return dir, nil
}

package pool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	spareSuffix   = ".spare" // see replaceFile
	reservedBytes = 4096
	fsNoCOW       = 0x00800000 // FS_NOCOW_FL of linux/fs.h
)

// dir is an open directory of the pool. All that is read and written goes through one, so an
// operation that has found its pool cannot end up in the empty directory below when the disk is unmounted
// meanwhile. No symbolic link in it is followed.
type dir struct{ *os.Root }

func openDir(path string) (dir, error) {
	root, err := os.OpenRoot(path)
	return dir{root}, err
}

// sub opens a directory in d. fs.ErrNotExist if there is none.
func (d dir) sub(name string) (dir, error) {
	if err := d.expect(name, fs.ModeDir); err != nil {
		return dir{}, err
	}
	root, err := d.OpenRoot(name)
	return dir{root}, err
}

// expect returns an error unless name is of the type: fs.ModeDir or, a regular file, 0.
func (d dir) expect(name string, want fs.FileMode) error {
	st, err := d.Lstat(name)
	if err != nil {
		return err
	}
	if st.Mode().Type() != want {
		return fmt.Errorf("%s/%s has the file type %v, expected %v", d.Name(), name, st.Mode().Type(), want)
	}
	return nil
}

// names returns what is in the directory, sorted.
func (d dir) names() ([]string, error) {
	entries, err := fs.ReadDir(d.FS(), ".")
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// readFile returns the content of a regular file of at most limit bytes.
func (d dir) readFile(name string, limit int64) ([]byte, error) {
	for {
		data, current, err := d.readOnce(name, limit)
		if err != nil || current {
			return data, err
		}
	}
}

// readOnce also tells whether the file still is the one of that name: one that has been replaced is
// overwritten by the next replacement, which waits for the lock of those who read it.
func (d dir) readOnce(name string, limit int64) (data []byte, current bool, err error) {
	if err := d.expect(name, 0); err != nil {
		return nil, false, err
	}
	f, err := d.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	if err := flock(f, unix.LOCK_SH); err != nil {
		return nil, false, err
	}
	if current, err = d.isAt(name, f); err != nil || !current {
		return nil, false, err
	}
	data, err = io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", f.Name(), limit)
	}
	return data, true, err
}

// isAt tells whether an open file is the one of that name.
func (d dir) isAt(name string, f *os.File) (bool, error) {
	opened, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := d.Lstat(name)
	if err != nil {
		return false, err
	}
	return os.SameFile(opened, now), nil
}

// replaceFile gives a file its content, durably: after a crash it has the old or the new one.
//
// The old file stays as a spare, and the next replacement writes into its blocks: once a file has been
// replaced, replacing it by up to 4 KiB takes no space. A volume must become a tombstone on a full file system too.
func (d dir) replaceFile(name string, data []byte) error {
	spare := name + spareSuffix
	f, err := d.openReserved(spare)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(f, unix.LOCK_EX); err != nil { // see readOnce
		return err
	}
	if err := overwrite(f, data); err != nil {
		return err
	}
	if err := d.exchange(spare, name); err != nil {
		return err
	}
	return d.sync()
}

// overwrite gives an open file its content, durably, in the blocks that it has.
func overwrite(f *os.File, data []byte) error {
	if _, err := f.WriteAt(data, 0); err != nil { // not truncated before: that would give the blocks away
		return err
	}
	if err := f.Truncate(int64(len(data))); err != nil {
		return err
	}
	return f.Sync()
}

// openReserved opens a file that, when it is new, gets reservedBytes of blocks to be overwritten in place.
func (d dir) openReserved(name string) (*os.File, error) {
	switch err := d.expect(name, 0); {
	case err == nil:
		return d.OpenFile(name, os.O_WRONLY|unix.O_NONBLOCK, 0)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	f, err := d.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := control(f, reserve); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "fallocate", Path: f.Name(), Err: err}, f.Close())
	}
	return f, nil
}

// reserve does what the file system can do: elsewhere, replacing takes space like any writing.
func reserve(fd int) error {
	// Only btrfs, and only as long as the file is empty, lets itself be told to overwrite in place.
	if flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); err == nil {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags)|fsNoCOW)
	}
	err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, reservedBytes)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// exchange swaps two names; where b does not exist, or the file system cannot swap, a becomes b.
func (d dir) exchange(a, b string) error {
	err := d.control(func(fd int) error { return unix.Renameat2(fd, a, fd, b, unix.RENAME_EXCHANGE) })
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return d.Rename(a, b)
	case err != nil:
		return &os.LinkError{Op: "exchange", Old: d.Name() + "/" + a, New: b, Err: err}
	}
	return nil
}

// noSpace makes an error of a full file system match qcow2.ErrNoSpace.
func noSpace(err error) error {
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	if !full || errors.Is(err, qcow2.ErrNoSpace) {
		return err
	}
	return fmt.Errorf("%w: %w", qcow2.ErrNoSpace, err)
}

// sync makes the names in the directory durable.
func (d dir) sync() error {
	if err := d.control(unix.Fsync); err != nil {
		return &fs.PathError{Op: "fsync", Path: d.Name(), Err: err}
	}
	return nil
}

// syncAll makes all of the directory's file system durable.
func (d dir) syncAll() error {
	if err := d.control(unix.Syncfs); err != nil {
		return &fs.PathError{Op: "syncfs", Path: d.Name(), Err: err}
	}
	return nil
}

// control runs a system call on the directory's descriptor.
func (d dir) control(call func(fd int) error) error {
	f, err := d.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	return control(f, call)
}

// control runs a system call on a descriptor until no signal interrupts it.
func control(f *os.File, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = conn.Control(func(fd uintptr) {
		for callErr = unix.EINTR; errors.Is(callErr, unix.EINTR); {
			callErr = call(int(fd))
		}
	})
	return errors.Join(err, callErr)
}

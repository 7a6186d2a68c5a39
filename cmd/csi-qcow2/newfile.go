package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// newFile is a file that gets its name when it is whole. A process that dies before leaves nothing; on a file system that
// knows no files without a name, it leaves one that the next run for the same name uses again.
type newFile struct {
	*os.File
	path    string
	partial string // the name that the file has until then, "" if it has none
}

// createNewFile makes a file, readable by its owner alone, that keep gives the name path. fs.ErrExist, if there is anything.
func createNewFile(path string) (*newFile, error) {
	switch _, err := os.Lstat(path); {
	case err == nil:
		return nil, plainError{path + " is there already, and stays as it is: give another name, or remove it", fs.ErrExist}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	switch {
	case err == nil:
		return &newFile{File: os.NewFile(uintptr(fd), path), path: path}, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL):
		return createPartial(path)
	}
	return nil, &fs.PathError{Op: "create", Path: path, Err: err}
}

// createPartial is createNewFile where files must have a name. What a run that died has left is used again.
func createPartial(path string) (*newFile, error) {
	partial := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".csi-qcow2-partial")
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	n := &newFile{File: f, path: path, partial: partial}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: another process is making this file: lock %s: %w", path, partial, err), f.Close())
	}
	here, err := f.Stat()
	if err == nil {
		var there fs.FileInfo
		if there, err = os.Lstat(partial); err == nil && !os.SameFile(here, there) {
			err = fs.ErrNotExist
		}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err != nil { // another process has given it its name just now, or has removed it
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return n, nil
}

// keep makes the file durable and gives it its name. fs.ErrExist, if somebody else has made one of that name meanwhile.
func (n *newFile) keep() error {
	err := n.Sync()
	if err != nil {
		return err
	}
	if n.partial == "" {
		self := "/proc/self/fd/" + strconv.Itoa(int(n.Fd()))
		err = unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, n.path, unix.AT_SYMLINK_FOLLOW)
	} else {
		err = unix.Renameat2(unix.AT_FDCWD, n.partial, unix.AT_FDCWD, n.path, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // the file system cannot
			err = os.Link(n.partial, n.path)
		}
	}
	if err != nil {
		return fmt.Errorf("give %s its name: %w", n.path, err)
	}
	return syncDir(filepath.Dir(n.path))
}

// close ends the use of the file. It is gone, if it was not kept.
func (n *newFile) close() error {
	err := error(nil)
	if n.partial != "" {
		if err = os.Remove(n.partial); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	return errors.Join(err, n.Close())
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

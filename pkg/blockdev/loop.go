package blockdev

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	loopMajor = 7

	// attachAttempts bounds the tries for a loop device that nobody else takes first.
	attachAttempts = 256
	// releaseAttempts bounds the looks whether a device is free, with pauses that double from
	// releasePause: programs like udev's probes open a device for some milliseconds.
	releaseAttempts = 8
	releasePause    = time.Millisecond
)

// errUnbound says that a loop device has no file, or no longer ours.
var errUnbound = errors.New("loop device is not bound")

// loopDevice is a loop device that is bound to a file of ours.
//
// Whoever can open a loop device may unbind it, even for reading and without any privilege; the kernel then gives the number
// to somebody else, while pods still have the device node. But it only notes that (LO_FLAGS_AUTOCLEAR) while others have the
// device open: so we keep it open, and take the note back (restore.go).
type loopDevice struct {
	number int
	// What identifies the file: when it is unbound the kernel gives the number to somebody else.
	fileDev, fileInode uint64
	filePath           string // in its own file system

	fd int // keeps it bound; open for reading, so that it keeps nobody from mounting the device. 0: not kept
}

func loopPath(number int) string { return fmt.Sprintf("/dev/loop%d", number) }

func loopSysfs(number int, name string) string {
	return fmt.Sprintf("/sys/block/loop%d/%s", number, name)
}

// bindLoop binds a free loop device to file, with nothing left of what it was before.
func bindLoop(file int, o Options) (loopDevice, error) {
	config := unix.LoopConfig{Fd: uint32(file), Size: uint32(o.LogicalBlockSize)}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if o.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:], o.Name)

	ctl, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return loopDevice{}, fmt.Errorf("open /dev/loop-control: %w", err)
	}
	defer unix.Close(ctl)
	for attempt := range attachAttempts {
		var number int
		number, err = freeLoop(ctl, o.Avoid)
		if err != nil {
			return loopDevice{}, fmt.Errorf("find a free loop device: %w", err)
		}
		var l loopDevice
		l, err = configureLoop(number, &config)
		if err == nil {
			return l, nil
		}
		// Taken by somebody else meanwhile, or about to be unbound.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) {
			return loopDevice{}, err
		}
		<-time.After(time.Duration(attempt) * 100 * time.Microsecond)
	}
	return loopDevice{}, fmt.Errorf("no free loop device after %d attempts: %w", attachAttempts, err)
}

// freeLoop returns the number of a loop device that is not bound and that nobody says to avoid.
func freeLoop(ctl int, avoid []string) (int, error) {
	number, err := unix.IoctlRetInt(ctl, unix.LOOP_CTL_GET_FREE)
	if err != nil || !slices.Contains(avoid, loopPath(number)) {
		return number, err
	}
	// The kernel knows one free device only.
	found := -1
	err = eachLoop(func(number int) error {
		path, err := backingFile(number)
		if found < 0 && path == "" && !slices.Contains(avoid, loopPath(number)) {
			found = number
		}
		return err
	})
	if err != nil || found >= 0 {
		return found, err
	}
	made, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(ctl), unix.LOOP_CTL_ADD, ^uintptr(0))
	if errno != 0 {
		return -1, errno
	}
	return int(made), nil
}

func configureLoop(number int, config *unix.LoopConfig) (loopDevice, error) {
	readOnly := config.Info.Flags&unix.LO_FLAGS_READ_ONLY != 0
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	fd, err := openLoop(number, flags)
	if err != nil {
		return loopDevice{}, err
	}
	defer unix.Close(fd)
	if err := unix.IoctlLoopConfigure(fd, config); err != nil {
		return loopDevice{}, fmt.Errorf("configure %s: %w", loopPath(number), err)
	}
	l, err := identify(fd, number)
	if err == nil && !readOnly { // a mark of BLKROSET outlives what was bound before
		err = unix.IoctlSetPointerInt(fd, unix.BLKROSET, 0)
	}
	if err == nil {
		l.fd, err = openLoop(number, unix.O_RDONLY)
	}
	if err != nil {
		_ = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
		return loopDevice{}, err
	}
	return l, nil
}

// identify describes the open, bound device.
func identify(fd, number int) (loopDevice, error) {
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return loopDevice{}, fmt.Errorf("status of %s: %w", loopPath(number), err)
	}
	path, err := backingFile(number)
	if err != nil {
		return loopDevice{}, err
	}
	return loopDevice{number: number, fileDev: info.Device, fileInode: info.Inode, filePath: path}, nil
}

// openLoop opens a loop device. It makes the device node where /dev is a static copy.
func openLoop(number, flags int) (int, error) {
	path := loopPath(number)
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(number))))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, fmt.Errorf("make device node %s: %w", path, err)
		}
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(loopMajor, uint32(number)) {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is not loop device %d (%w)", path, number, errors.Join(err, unix.ENODEV))
	}
	return fd, nil
}

// verify checks that the kernel has done what it was asked for.
func (l *loopDevice) verify(name string, size int64) error {
	info, err := l.status(l.fd)
	if err != nil {
		return err
	}
	if got := unix.ByteSliceToString(info.File_name[:]); got != name {
		return fmt.Errorf("%s is named %q, not %q", loopPath(l.number), got, name)
	}
	if l.filePath != "/"+name { // Find, and seeing that the device is gone, need it
		return fmt.Errorf("%s has file %q in /sys, not %q", loopPath(l.number), l.filePath, "/"+name)
	}
	if info.Flags&unix.LO_FLAGS_DIRECT_IO == 0 {
		return fmt.Errorf("%s does no direct I/O: kernel refused it", loopPath(l.number))
	}
	return checkSize(l.fd, l.number, size)
}

func checkSize(fd, number int, size int64) error {
	got, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return fmt.Errorf("size of %s: %w", loopPath(number), err)
	}
	if got != size {
		return fmt.Errorf("%s has %d bytes, not %d", loopPath(number), got, size)
	}
	return nil
}

// status returns the device's state, errUnbound if it is not bound to our file.
func (l *loopDevice) status(fd int) (*unix.LoopInfo64, error) {
	info, err := unix.IoctlLoopGetStatus64(fd)
	switch {
	case errors.Is(err, unix.ENXIO):
		return nil, errUnbound
	case err != nil:
		return nil, fmt.Errorf("status of %s: %w", loopPath(l.number), err)
	case info.Device != l.fileDev || info.Inode != l.fileInode:
		return nil, errUnbound
	}
	return info, nil
}

// setCapacity makes the kernel take over the file's size.
func (l *loopDevice) setCapacity(size int64) error {
	if _, err := l.status(l.fd); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(l.fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("set capacity of %s: %w", loopPath(l.number), err)
	}
	return checkSize(l.fd, l.number, size)
}

// close gives up the descriptor that keeps the device.
func (l *loopDevice) close() {
	if l.fd > 0 {
		unix.Close(l.fd)
		l.fd = 0
	}
}

// markAutoclear makes the kernel unbind the device at its last close, which may be the one in here. The exclusive open fails
// while a file system or a stacked device is on it.
func (l *loopDevice) markAutoclear() error {
	fd, err := openLoop(l.number, unix.O_RDONLY|unix.O_EXCL)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: %w", loopPath(l.number), ErrBusy)
	case errors.Is(err, unix.ENXIO): // being unbound right now
		return errUnbound
	case err != nil:
		return err
	}
	defer unix.Close(fd)
	info, err := l.status(fd)
	if err != nil {
		return err
	}
	info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(fd, info); err != nil {
		return fmt.Errorf("set status of %s: %w", loopPath(l.number), err)
	}
	return nil
}

// unmarkAutoclear takes the mark away. It may stay while somebody has claimed the device in this very moment: Check goes on.
func (l *loopDevice) unmarkAutoclear() error {
	info, err := l.status(l.fd)
	if err != nil {
		return err
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(l.fd, info); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("set status of %s: %w", loopPath(l.number), err)
	}
	return nil
}

// keep opens the device again, if it is still ours, so that it stays bound. errUnbound.
func (l *loopDevice) keep() error {
	fd, err := openLoop(l.number, unix.O_RDONLY)
	if errors.Is(err, unix.ENXIO) { // being unbound right now
		return errUnbound
	}
	if err == nil {
		if _, err = l.status(fd); err != nil {
			unix.Close(fd)
		}
	}
	if err == nil {
		l.fd = fd
	}
	return err
}

// clear unbinds the device at its last close, which may be the one in here.
func (l *loopDevice) clear() error {
	fd, err := openLoop(l.number, unix.O_RDONLY)
	if errors.Is(err, unix.ENXIO) { // being unbound right now
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := l.status(fd); errors.Is(err, errUnbound) {
		return nil
	} else if err != nil {
		return err
	}
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("clear %s: %w", loopPath(l.number), err)
	}
	return nil
}

// gone tells if the device is no longer bound to our file. It does not open the device: that would make
// it the user that it looks for. In doubt the answer is no.
func (l *loopDevice) gone() bool {
	path, err := backingFile(l.number)
	return err == nil && path != l.filePath
}

// waitUntil waits, for a bounded time, until free says yes.
func waitUntil(free func() bool) bool {
	pause := releasePause
	for range releaseAttempts {
		if free() {
			return true
		}
		<-time.After(pause)
		pause *= 2
	}
	return free()
}

// backingFile returns the path of a loop device's file in its own file system, "" if it is not bound.
func backingFile(number int) (string, error) {
	b, err := os.ReadFile(loopSysfs(number, "loop/backing_file"))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("file of %s: %w", loopPath(number), err)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

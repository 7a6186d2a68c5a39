package host

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// QEMU's image locks. Each permission on an image has two bytes of the file, far below anything that the
// locks could hurt: who holds the permission has a shared lock on byte 100 + its number, who does not admit
// others that hold it has one on byte 200 + its number. Shared locks never exclude each other, so
// every opener first takes all of its own and then looks for the opposite ones of others. Of two that come at the
// same instant both may give up; never do both go on.
//
// They are open file description locks: they belong to the opened file, not to the process. Two openers in one process
// exclude each other, and what is left of them goes when the last descriptor does, by Close or by death.
const (
	permHeldBase     = 100
	permUnsharedBase = 200
)

// permissions is a set of QEMU's permissions on an image. Nobody who opens an image takes number 2, "write unchanged".
type permissions uint

const (
	permConsistentRead permissions = 1 << 0
	permWrite          permissions = 1 << 1
	permResize         permissions = 1 << 3
	permCount                      = 4
)

// What QEMU's qcow2 driver holds of an image that it reads, and of one that it writes; and what it admits
// in others of neither.
const (
	readerHolds = permConsistentRead
	writerHolds = permConsistentRead | permWrite | permResize
	unshared    = permWrite | permResize
)

// acquireLocks takes an opener's locks on an open file, or none and ErrInUse.
func acquireLocks(fd int, held permissions) error {
	steps := []struct {
		set  permissions
		base int64
		do   func(fd int, off int64) error
	}{
		{held, permHeldBase, lockByte},
		{unshared, permUnsharedBase, lockByte},
		{held, permUnsharedBase, checkByte},
		{unshared, permHeldBase, checkByte},
	}
	for _, s := range steps {
		err := s.set.each(func(number int64) error { return s.do(fd, s.base+number) })
		if err != nil {
			return errors.Join(err, releaseLocks(fd))
		}
	}
	return nil
}

// each calls f with the number of each permission, until one fails.
func (set permissions) each(f func(number int64) error) error {
	for p := range int64(permCount) {
		if set&(1<<p) == 0 {
			continue
		}
		if err := f(p); err != nil {
			return err
		}
	}
	return nil
}

func lockByte(fd int, off int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: off, Len: 1}
	err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return ErrInUse // an exclusive lock: not QEMU's, but meant for us too
	}
	return err
}

// checkByte returns ErrInUse if another opener has a lock, of any kind, on the byte.
func checkByte(fd int, off int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
		return err
	}
	if lk.Type != unix.F_UNLCK {
		return ErrInUse
	}
	return nil
}

func releaseLocks(fd int) error {
	lk := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart}
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk)
}

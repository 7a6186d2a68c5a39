package pool

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockMode is how a directory is locked.
type lockMode int

const (
	exclusive    lockMode = iota // waits; for the pool's own lock, which is held for moments only
	tryExclusive                 // ErrInUse
	tryShared                    // ErrInUse
)

// Shared locks are held for the time of reading a snapshot table. Who wants a volume for himself waits so
// long for them to go.
const (
	readersPatience = 2 * time.Second
	readersPoll     = 5 * time.Millisecond
)

// dirLock is a lock on a directory. It belongs to the open file: two of one process exclude each other
// too, it is the directory's whatever its name becomes, and it goes when the process dies.
type dirLock struct{ f *os.File }

func lockDir(d dir, mode lockMode) (dirLock, error) {
	f, err := d.Open(".")
	if err != nil {
		return dirLock{}, err
	}
	l := dirLock{f}
	switch mode {
	case exclusive:
		err = l.flock(unix.LOCK_EX)
	case tryShared:
		err = l.flock(unix.LOCK_SH | unix.LOCK_NB)
	case tryExclusive:
		err = l.outwaitReaders()
	}
	if err != nil {
		return dirLock{}, errors.Join(fmt.Errorf("lock %s: %w", d.Name(), err), f.Close())
	}
	return l, nil
}

// outwaitReaders takes the lock exclusively: ErrInUse at once if somebody else has it so, and after
// readersPatience if there are readers all the time.
func (l dirLock) outwaitReaders() error {
	for deadline := time.Now().Add(readersPatience); ; <-time.After(readersPoll) {
		err := l.flock(unix.LOCK_EX | unix.LOCK_NB)
		if !errors.Is(err, ErrInUse) || time.Now().After(deadline) {
			return err
		}
		if err := l.flock(unix.LOCK_SH | unix.LOCK_NB); err != nil {
			return err // not even a reader is let in
		}
		if err := l.flock(unix.LOCK_UN); err != nil {
			return err
		}
	}
}

func (l dirLock) flock(how int) error { return flock(l.f, how) }

// flock is flock(2). ErrInUse instead of EWOULDBLOCK.
func flock(f *os.File, how int) error {
	err := control(f, func(fd int) error { return unix.Flock(fd, how) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrInUse
	}
	return err
}

// Close unlocks explicitly: a child that is between fork and exec just now would hold the lock a little longer.
func (l dirLock) Close() error {
	return errors.Join(l.flock(unix.LOCK_UN), l.f.Close())
}

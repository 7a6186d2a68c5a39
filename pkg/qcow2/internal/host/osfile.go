package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"golang.org/x/sys/unix"
)

// osFile is a File of the operating system: a regular file that holds QEMU's byte locks while it is open.
type osFile struct {
	f        *os.File
	readOnly bool
}

// OpenFile opens the regular file at path and takes the byte locks that QEMU takes for an image, so that
// one writer, or any number of readers, of either kind have it. It fails at once: ErrInUse when somebody
// else has the file in a way that excludes this one, fs.ErrNotExist when there is none.
//
// A symbolic link at path is followed, as QEMU's tools do; who must not follow one looks first.
func OpenFile(path string, readOnly bool) (File, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	// Without O_NONBLOCK, opening a FIFO would wait for its other end.
	f, err := os.OpenFile(path, mode|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, classify(err)
	}
	return lockedFile(f, readOnly)
}

// OpenUnlocked opens the regular file at path for reading, whoever has it: no lock is taken or looked at.
func OpenUnlocked(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, classify(err)
	}
	o := &osFile{f: f, readOnly: true}
	if err := o.expectRegular(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return o, nil
}

// CreateFile creates path, readable by its owner alone, and opens it for writing as OpenFile does.
// ErrExists when there is anything at path. Its directory is the caller's to sync.
func CreateFile(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, classify(err)
	}
	o, err := lockedFile(f, false)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return o, nil
}

// NewFile uses a regular file that is open, and takes ownership of it. It takes the byte locks that OpenFile takes.
func NewFile(f *os.File, readOnly bool) (File, error) { return lockedFile(f, readOnly) }

// lockedFile takes ownership of f.
func lockedFile(f *os.File, readOnly bool) (File, error) {
	o := &osFile{f: f, readOnly: readOnly}
	if err := o.lock(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return o, nil
}

// lock takes the byte locks of a file that is one.
func (o *osFile) lock() error {
	if err := o.expectRegular(); err != nil {
		return err
	}
	held := writerHolds
	if o.readOnly {
		held = readerHolds
	}
	if err := o.control(func(fd int) error { return acquireLocks(fd, held) }); err != nil {
		return fmt.Errorf("lock %s: %w", o.f.Name(), err)
	}
	return nil
}

func (o *osFile) expectRegular() error {
	st, err := o.f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("open %s: not a regular file: %w", o.f.Name(), format.ErrUnsupported)
	}
	return err
}

func (o *osFile) Name() string { return o.f.Name() }

func (o *osFile) Size() (int64, error) {
	st, err := o.f.Stat()
	if err != nil {
		return 0, classify(err)
	}
	return st.Size(), nil
}

func (o *osFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.f.ReadAt(p, off)
	return n, at(err, off) // io.EOF stays bare
}

func (o *osFile) WriteAt(p []byte, off int64) (int, error) {
	if o.readOnly {
		return 0, o.refuse("write")
	}
	n, err := o.f.WriteAt(p, off)
	return n, at(err, off)
}

// Sync uses fdatasync, which makes the length and all that is needed to find the data durable; only
// times may be lost.
func (o *osFile) Sync() error {
	if o.readOnly {
		return nil
	}
	return o.op("fdatasync", unix.Fdatasync)
}

func (o *osFile) Truncate(size int64) error {
	if o.readOnly {
		return o.refuse("truncate")
	}
	return at(o.f.Truncate(size), size)
}

// Close gives the locks back by itself: a child that is between fork and exec just now would hold
// them a little longer than the file.
func (o *osFile) Close() error {
	unlockErr := o.op("unlock", releaseLocks)
	if errors.Is(unlockErr, ErrClosed) {
		return unlockErr
	}
	return errors.Join(unlockErr, o.f.Close())
}

// op runs a system call on the descriptor and names the file in its error.
func (o *osFile) op(name string, call func(fd int) error) error {
	if err := o.control(call); err != nil {
		return classify(&fs.PathError{Op: name, Path: o.f.Name(), Err: err})
	}
	return nil
}

// control runs a system call on the descriptor, which stays open meanwhile, until no signal interrupts it.
func (o *osFile) control(call func(fd int) error) error {
	conn, err := o.f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = conn.Control(func(fd uintptr) {
		for callErr = unix.EINTR; errors.Is(callErr, unix.EINTR); {
			callErr = call(int(fd))
		}
	})
	if err != nil { // the only reason is that the file has been closed
		return fs.ErrClosed
	}
	return callErr
}

func (o *osFile) refuse(op string) error {
	return fmt.Errorf("%s %s: %w", op, o.f.Name(), ErrReadOnly)
}

// at adds an offset to an error of an operation on a file. Nil and io.EOF stay as they are.
func at(err error, off int64) error {
	var pathErr *fs.PathError
	if !errors.As(err, &pathErr) {
		return err
	}
	return fmt.Errorf("at offset %d: %w", off, classify(err))
}

// classify wraps the operating system's errors so that they also match this package's.
func classify(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w: %w", ErrExists, err)
	case errors.Is(err, fs.ErrClosed):
		return fmt.Errorf("%w: %w", ErrClosed, err)
	default:
		return err
	}
}

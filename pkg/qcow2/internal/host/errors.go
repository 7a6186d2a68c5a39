package host

import "errors"

// Errors that the callers of qcow2 match, too. Each is wrapped with the file that it concerns.
var (
	// ErrExists is returned when a file to be created exists.
	ErrExists = errors.New("already exists")
	// ErrInUse is returned when another process holds the file (QEMU's byte locks).
	ErrInUse = errors.New("in use")
	// ErrNoSpace is returned when the file system that holds the file is full.
	ErrNoSpace = errors.New("no space left")
	// ErrReadOnly is returned when a file that is open for reading is written.
	ErrReadOnly = errors.New("read-only")
	// ErrOutOfRange is returned for a negative offset or length.
	ErrOutOfRange = errors.New("out of range")
	// ErrClosed is returned by operations on a closed file.
	ErrClosed = errors.New("image is closed")
)

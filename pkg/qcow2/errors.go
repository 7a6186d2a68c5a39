package qcow2

import (
	"errors"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Errors that callers match with errors.Is. Each is wrapped with the file, the
// structure and the offset it concerns.
var (
	// ErrNotFound is returned when a snapshot that an operation names does not exist.
	ErrNotFound = errors.New("not found")

	// ErrExists is returned when a snapshot of that name, or a file to be created, exists.
	ErrExists = errors.New("already exists")

	// ErrInUse is returned when another process holds the image (QEMU's byte locks), or
	// when a snapshot to be deleted is open.
	ErrInUse = errors.New("in use")

	// ErrCorrupt is returned when metadata contradicts the format. Nothing was changed.
	ErrCorrupt = format.ErrCorrupt

	// ErrUnsupported is returned for a legal image feature, or an operation on it, that
	// this package refuses. The text names the feature.
	ErrUnsupported = format.ErrUnsupported

	// ErrNoSpace is returned when the file system that holds the image is full.
	ErrNoSpace = errors.New("no space left")

	// ErrLimit is returned when a limit of the format would be exceeded: snapshots,
	// table sizes, reference counts.
	ErrLimit = format.ErrLimit

	// ErrReadOnly is returned when an image or a snapshot that is open for reading is written.
	ErrReadOnly = errors.New("read-only")

	// ErrOutOfRange is returned when a request reaches beyond the end of the disk, or has
	// a negative offset or length.
	ErrOutOfRange = errors.New("out of range")

	// ErrFailed is returned by every operation after a write of metadata or a sync has
	// failed: what is on disk is unknown until the image is opened again.
	ErrFailed = errors.New("image failed earlier; open it again")

	// ErrClosed is returned by operations on a closed image.
	ErrClosed = errors.New("image is closed")
)

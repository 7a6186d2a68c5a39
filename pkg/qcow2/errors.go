package qcow2

import (
	"errors"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/fsck"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// Errors that callers match with errors.Is. Each is wrapped with the file, the
// structure and the offset it concerns.
var (
	// ErrNotFound is returned when a snapshot that an operation names does not exist.
	ErrNotFound = errors.New("not found")

	// ErrExists is returned when a snapshot of that name, or a file to be created, exists.
	ErrExists = host.ErrExists

	// ErrInUse is returned when another process holds the image (QEMU's byte locks), or
	// when a snapshot to be deleted is open.
	ErrInUse = host.ErrInUse

	// ErrCorrupt is returned when metadata contradicts the format. What the disk and its snapshots hold was not changed. An image
	// that is open for writing is marked as corrupt, and only read from then on.
	ErrCorrupt = format.ErrCorrupt

	// ErrNeedsRepair is returned, with ErrCorrupt, for an image that is not to be written before Repair has mended it.
	ErrNeedsRepair = fsck.ErrNeedsRepair

	// ErrUnsupported is returned for a legal image feature, or an operation on it, that
	// this package refuses. The text names the feature.
	ErrUnsupported = format.ErrUnsupported

	// ErrNoSpace is returned when the file system that holds the image is full.
	ErrNoSpace = host.ErrNoSpace

	// ErrLimit is returned when a limit of the format would be exceeded: snapshots,
	// table sizes, reference counts.
	ErrLimit = format.ErrLimit

	// ErrReadOnly is returned when an image or a snapshot that is open for reading is written.
	ErrReadOnly = host.ErrReadOnly

	// ErrOutOfRange is returned when a request reaches beyond the end of the disk, or has
	// a negative offset or length.
	ErrOutOfRange = host.ErrOutOfRange

	// ErrFailed is returned by every operation after a write of metadata or a sync has
	// failed: what is on disk is unknown until the image is opened again.
	ErrFailed = errors.New("image failed earlier; open it again")

	// ErrClosed is returned by operations on a closed image.
	ErrClosed = host.ErrClosed
)

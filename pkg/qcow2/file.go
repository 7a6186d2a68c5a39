package qcow2

import (
	"os"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// File is all that an image needs of the file it lives in. OpenFile and its like return one; another implementation is safe for
// concurrent use, and returns ErrNoSpace when there is no space left. It may be an Allocator and a RangeCloner, too.
//
//	type File interface {
//		ReadAt(p []byte, off int64) (int, error)  // as io.ReaderAt: beyond the end io.EOF, with the bytes that exist
//		WriteAt(p []byte, off int64) (int, error) // as io.WriterAt; the file grows as needed
//		Sync() error                              // makes all completed writes, punches and the length durable
//		Truncate(size int64) error                // sets the length in bytes; a longer file reads as zeros
//		PunchHole(off, n int64) error             // makes n bytes at off read as zeros, gives their blocks back, and keeps the length
//		Size() (int64, error)                     // the length in bytes
//		Name() string                             // which file this is, for error messages
//		Close() error                             // releases the file and its locks
//	}
type File = host.File

// An Allocator is a File that can take blocks ahead of need, so that a later write cannot meet a full file system.
//
//	type Allocator interface {
//		// Allocate gives n bytes at off blocks, which may lie beyond the end. Content and length stay as they are.
//		// ErrNoSpace; an error that matches errors.ErrUnsupported where the file system cannot.
//		Allocate(off, n int64) error
//	}
type Allocator = host.Allocator

// A RangeCloner is a File that can take over a part of another one without copying it.
//
//	type RangeCloner interface {
//		// CloneRange makes n bytes at dstOff share the blocks of n bytes at srcOff of src. The file grows as needed.
//		// An error that matches errors.ErrUnsupported says that these bytes have to be copied instead.
//		CloneRange(src File, srcOff, dstOff, n int64) error
//	}
type RangeCloner = host.RangeCloner

// OpenFile opens the regular file at path and takes the byte locks that QEMU takes for an image, so that
// one writer, or any number of readers, of either kind have it. It fails at once: ErrInUse when somebody
// else has the file in a way that excludes this one, fs.ErrNotExist when there is none.
//
// A symbolic link at path is followed, as QEMU's tools do; who must not follow one looks first.
func OpenFile(path string, readOnly bool) (File, error) { return host.OpenFile(path, readOnly) }

// CreateFile creates path, readable by its owner alone, and opens it for writing as OpenFile does.
// ErrExists when there is anything at path. Its directory is the caller's to sync.
func CreateFile(path string) (File, error) { return host.CreateFile(path) }

// NewFile uses a regular file that is open, and takes ownership of it. It takes the byte locks that OpenFile takes.
func NewFile(f *os.File, readOnly bool) (File, error) { return host.NewFile(f, readOnly) }

// OpenDirectFile is OpenFile for writing, past the page cache if the file system says how: in blocks of 512 bytes, or of 4 KiB on
// a disk with such sectors, or where XFS shares the file's blocks with another. Writes of parts of a block do not mix with others
// of that block, unless these are parts, too.
func OpenDirectFile(path string) (File, error) { return host.OpenDirectFile(path) }

// Package host is the file that an image lives in: I/O through the page cache or past it, QEMU's byte locks, space that is
// taken, punched and shared, syncs, and the mark beside the content. It knows nothing of what the file holds.
package host

// File is all that an image needs of the file it lives in. Tests put fault injection and
// crash recording behind it.
//
// Implementations are safe for concurrent use. Reads beyond the end return io.EOF with the
// bytes that exist, as io.ReaderAt does.
type File interface {
	// ReadAt reads len(p) bytes at off, as io.ReaderAt.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes p at off, as io.WriterAt; the file grows as needed.
	WriteAt(p []byte, off int64) (int, error)
	// Sync makes all completed writes, punches and the length durable.
	Sync() error
	// Truncate sets the length. A longer file reads as zeros.
	Truncate(size int64) error
	// PunchHole makes n bytes at off read as zeros and gives their blocks back. The length
	// does not change.
	PunchHole(off, n int64) error
	// Size returns the length in bytes.
	Size() (int64, error)
	// Name says which file this is, for error messages.
	Name() string
	// Close releases the file and its locks.
	Close() error
}

// A Writebacker is a File that can begin to write what is in the page cache.
type Writebacker interface {
	// StartWriteback begins to write n bytes at off and waits for nothing. It promises nothing: Sync does.
	StartWriteback(off, n int64)
}

// An Allocator is a File that can take blocks ahead of need, so that a later write cannot meet a full file system.
type Allocator interface {
	// Allocate gives n bytes at off blocks, which may lie beyond the end. Content and length stay as they are.
	// ErrNoSpace; an error that matches errors.ErrUnsupported where the file system cannot.
	Allocate(off, n int64) error
}

// A RangeCloner is a File that can take over a part of another one without copying it.
type RangeCloner interface {
	// CloneRange makes n bytes at dstOff share the blocks of n bytes at srcOff of src. The
	// file grows as needed. An error that matches errors.ErrUnsupported says that these bytes have to be copied
	// instead: another file system, one without shared blocks, or a range that is not aligned to its blocks.
	CloneRange(src File, srcOff, dstOff, n int64) error
}

// A Settler is a RangeCloner that shares blocks in a way that would make the next Sync long, for the file and for others
// beside it. Settle makes what it has shared durable without that.
type Settler interface{ Settle() error }

// A Marker is a File that can keep a mark.
type Marker interface {
	// State tells files and what they hold apart.
	State() (FileState, error)
	// SetWritten sets the time of the last write, in nanoseconds since 1970, as far as the file system keeps it.
	SetWritten(t int64) error
	// Mark returns the mark, nil if there is none.
	Mark() ([]byte, error)
	// SetMark replaces it; nil removes it.
	SetMark(mark []byte) error
	// Boot tells boots of the machine apart: 16 bytes, or none if that is not known.
	Boot() string
}

// FileState is the identity of a file, and of its content as far as its length and times tell.
type FileState struct {
	Inode   uint64
	Born    int64 // nanoseconds since 1970, as the next
	Size    int64
	Written int64
}

// A DirectIO is a File whose I/O goes past the page cache.
type DirectIO interface {
	// BlockSize is what offset and length of its I/O are multiples of where it is quick, in bytes: it writes no less at once.
	BlockSize() int64
	// FD is its descriptor, for I/O that others do. It stays the file's.
	FD() int
	// InHand tells of requests that others do with the descriptor: so many more, or with a negative number less.
	InHand(change int32)
}

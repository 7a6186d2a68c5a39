package qcow2

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

// A writebacker is a File that can begin to write what is in the page cache.
type writebacker interface {
	// StartWriteback begins to write n bytes at off and waits for nothing. It promises nothing: Sync does.
	StartWriteback(off, n int64)
}

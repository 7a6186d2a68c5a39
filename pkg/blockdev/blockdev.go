// Package blockdev makes a kernel block device out of anything that can be read and written at an
// offset: a FUSE file system with one file, and a loop device with direct I/O on it.
//
// It has three parts that know little of each other. A connection (conn.go, protocol.go) is the FUSE
// file; it is mounted in no namespace, so nobody but the loop driver can reach it. A server
// (server.go) answers the connection's requests with the Backend. A loopDevice (loop.go) is the
// device that users see. Device ties them together; Find and Clear deal with devices whose server has
// died.
package blockdev

import "errors"

// Backend is what a device serves. All methods are called concurrently. But the loop driver hands on
// nothing else, not even a read, while it waits for a Flush, Discard or WriteZeroes: they should be quick.
type Backend interface {
	// ReadAt and WriteAt are those of io.ReaderAt and io.WriterAt. The buffer is page-aligned and
	// belongs to the caller again on return. Offset and length are multiples of the logical block size.
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// WriteZeroes makes n bytes at off read as zeros and keeps their allocation. n may be 4 GiB.
	WriteZeroes(off, n int64) error
	// Discard makes n bytes at off read as zeros and gives up what it can of their allocation. n may
	// be 4 GiB; the range need not be aligned to the discard granularity.
	Discard(off, n int64) error
	// Flush makes all completed writes durable.
	Flush() error
	// Size returns the length in bytes, a multiple of the logical block size, at once.
	Size() int64
}

// Options of a device.
type Options struct {
	// Name is what LOOP_GET_STATUS64 reports as the device's file name, 1 to 63 bytes without "/": it marks
	// the device as ours and says which volume it is, also after its server has died.
	Name string
	// LogicalBlockSize in bytes, a power of two from 512 to the page size; 0 = 512.
	LogicalBlockSize int
	// DiscardGranularity in bytes, a power of two, the cluster size of an image; 0 = 4096. Below the
	// logical block size it means that.
	DiscardGranularity int
	ReadOnly           bool
	// Avoid are paths of loop devices that must not be used, though nothing is bound to them.
	Avoid []string
	// Keep, if not nil, has a copy of a descriptor of the loop device kept outside of this process: as long as somebody has it
	// the kernel does not give the device's number away. -1: the copy is to be closed; it is when Keep returns nil.
	Keep func(fd int) error
	// Restore is called by Check: it runs the function of that name in a process that holds nothing but fd, and waits for it,
	// but not for ever. A process of the caller's that were killed in there could not end, nor be followed. Nil: in this one.
	Restore func(fd int, want []byte) error
	// Journal keeps unanswered requests in memory of the Handle, as for a kernel that cannot hand them out again.
	Journal bool
	// Broken, if not nil, is called when the server cannot go on, nor say what became of the requests that it has in hand. The
	// process should end, so that another resumes the device. Nil: the device's users get errors.
	Broken func(error)
	// Errno maps a Backend's error to what the device's user sees; nil, or an answer of 0: EIO. Of a failed
	// write the user sees ENOSPC as such; the loop driver makes EIO of anything that a flush or a discard failed with.
	Errno func(error) uintptr
}

// ErrBusy is returned by Detach and Clear while something has the device open.
var ErrBusy = errors.New("device is in use")

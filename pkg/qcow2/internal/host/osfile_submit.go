package host

import (
	"errors"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// submitters are for writes past the page cache that others need not wait for. A file system may hold a lock of the file while
// it allocates blocks: ext4 until pwrite(2) has them on the disk, and until then nobody else reads or writes the file. A write
// that is submitted to the kernel (io_submit(2)) lets go of the lock before.
type submitters struct {
	mu      lock.Mutex[lock.Queue] // guards what follows
	idle    []*submitter
	refused bool // there can be no more of them
}

// submitter has one write in hand.
type submitter struct {
	context uintptr // aio_context_t
	data    []byte  // what is written: held here it is not on a stack, which moves
	control submission
	event   completion
}

// submission is struct iocb (linux/aio_abi.h).
type submission struct {
	_, _       uint64 // given back with the completion; flags
	opcode     uint16
	_          int16 // priority
	fd         uint32
	buf, bytes uint64
	offset     int64
	_, _       uint64 // flags, and whom else to tell
}

// completion is struct io_event.
type completion struct {
	_, _   uint64 // which submission
	result int64  // bytes, or -errno
	_      int64
}

const submitWrite = 1 // IOCB_CMD_PWRITE

// get returns a submitter, nil if the kernel has none to give.
func (s *submitters) get() *submitter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.idle); n > 0 {
		w := s.idle[n-1]
		s.idle = s.idle[:n-1]
		return w
	}
	if s.refused {
		return nil
	}
	w := &submitter{}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&w.context)), 0); errno != 0 {
		s.refused = true
		return nil
	}
	return w
}

func (s *submitters) put(w *submitter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle = append(s.idle, w)
}

// close ends the submitters, all of which are idle.
func (s *submitters) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all sync.WaitGroup
	for _, w := range s.idle { // together, for each waits tens of ms for the kernel
		all.Go(func() { _, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, w.context, 0, 0) })
	}
	all.Wait()
	s.idle, s.refused = nil, true
}

// write writes p at off, waits until that is done, and returns how much was written: less if there was an error, which whoever
// writes the rest will meet.
func (w *submitter) write(fd int, p []byte, off int64) int {
	w.data = p
	defer func() { w.data = nil }()
	w.control = submission{
		opcode: submitWrite, fd: uint32(fd), buf: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), bytes: uint64(len(p)), offset: off,
	}
	list := &w.control
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, w.context, 1, uintptr(unsafe.Pointer(&list))); errno != 0 {
		return 0
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, w.context, 1, 1, uintptr(unsafe.Pointer(&w.event)), 0, 0)
		if n == 1 {
			return int(max(w.event.result, 0))
		}
		if !errors.Is(errno, unix.EINTR) {
			panic("io_getevents: " + errno.Error()) // the kernel still has p, and w
		}
	}
}

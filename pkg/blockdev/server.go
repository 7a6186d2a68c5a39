package blockdev

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// serverThreads is how many requests are worked on at the same time.
	serverThreads = 16
	// threadPayload is the most data of a request where threads do all the I/O.
	threadPayload = 256 << 10
)

// server answers the requests of a connection with a backend: from an event loop if the backend has a file for it and the
// kernel an io_uring, else from OS threads, each of which waits for a request in read(2), works on it, answers. Between
// these there is no hand-over, no queue, no allocation.
type server struct {
	conn    *connection
	backend Backend
	direct  Direct  // nil: threads do all the I/O
	options Options // with defaults filled in

	messages *messages
	working  sync.RWMutex  // held shared while a request is worked on, exclusively for ever by who has left the device
	waiting  atomic.Int64  // requests that were read and have no answer yet
	running  atomic.Int32  // threads
	loop     *eventLoop    // nil: threads
	done     chan struct{} // closed when nothing calls the backend any more
}

// newServer makes a server in the memory of ms, which is its own from then on.
func newServer(b Backend, o Options, ms *messages) *server {
	return &server{backend: b, direct: direct(b), options: o, messages: ms, done: make(chan struct{})}
}

// direct returns b if an event loop can do its I/O.
func direct(b Backend) Direct {
	if d, ok := b.(Direct); ok {
		if _, ok := d.DirectFile(); ok {
			return d
		}
	}
	return nil
}

// payload is the most data that one request should carry. Threads each need that much memory all the time.
func payload(d Direct) int {
	if d == nil {
		return threadPayload
	}
	if err := tryRing(); err != nil {
		return threadPayload
	}
	return maxPayload
}

// start begins to serve. It ends when the connection does.
func (s *server) start(c *connection) error {
	s.conn = c
	if s.direct != nil {
		err := s.startLoop()
		if err == nil {
			return nil
		}
		klog.InfoS("Serving without an event loop, which is slower", "device", s.options.Name, "reason", err)
	}
	if err := unix.SetNonblock(c.dev, false); err != nil {
		return err
	}
	s.running.Store(serverThreads)
	for i := range serverThreads {
		m := s.messages.at(smallMessages + i)
		m.populate(c.payload)
		go s.run(m)
	}
	return nil
}

func (s *server) startLoop() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		beFlusher()
		l, err := newEventLoop(s, s.direct)
		s.loop = l
		started <- err
		if err == nil && l.run() {
			close(s.done)
		}
	}()
	return <-started
}

// leave stops serving, see Device.Leave.
func (s *server) leave() {
	if s.loop != nil {
		s.loop.leave()
		return
	}
	s.working.Lock()
}

// close frees the memory. No thread may be running.
func (s *server) close() { s.messages.close() }

func (s *server) run(m message) {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	beFlusher()
	defer func() {
		if s.running.Add(-1) == 0 {
			close(s.done)
		}
	}()
	for {
		err := s.serveOne(m)
		if errors.Is(err, unix.ENODEV) {
			return
		}
		if err != nil {
			s.abort(err)
			return
		}
	}
}

// beFlusher makes the kernel never let the calling thread wait for writeback to the device that it serves. It needs
// CAP_SYS_RESOURCE; without it only that guarantee is missing.
func beFlusher() { _ = unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0) }

// abort ends a connection that has failed: an unanswered request is hung I/O for ever, an error is better.
func (s *server) abort(reason error) {
	klog.ErrorS(reason, "FUSE connection failed, aborting it", "device", s.options.Name)
	if err := s.conn.abort(); err != nil {
		klog.ErrorS(err, "Cannot abort FUSE connection", "device", s.options.Name)
	}
}

// serveOne answers one request.
func (s *server) serveOne(m message) error {
	r, err := s.conn.receive(m)
	if err != nil {
		return err
	}
	if !r.valid() {
		return fmt.Errorf("malformed FUSE request of %d bytes", len(r))
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	s.working.RLock()
	defer s.working.RUnlock()
	return s.answer(m)
}

// answer carries out the request of a message and replies; the message is free then.
func (s *server) answer(m message) error {
	defer m.clear()
	r := m.held()
	if !r.wantsReply() {
		return nil
	}
	op := r.opcode()
	if err := s.conn.send(m.conclude(s.handle(r, m))); err != nil {
		return fmt.Errorf("reply to FUSE operation %d: %w", op, err)
	}
	return nil
}

// handle carries out a request and returns the length of the reply's payload, or an error.
func (s *server) handle(r request, m message) (int, unix.Errno) {
	switch r.opcode() {
	case opRead:
		return s.read(r, m)
	case opWrite:
		return s.write(r, m)
	case opFsync: // never ENOSYS: the kernel would take it for "nothing to flush" from then on
		return 0, s.errno(s.backend.Flush())
	case opFallocate: // never ENOSYS nor EOPNOTSUPP: discard would be off from then on
		return 0, s.fallocate(r)
	case opLookup:
		if r.nodeID() != rootID || r.name() != s.options.Name {
			return 0, unix.ENOENT
		}
		putEntryOut(m.payload(entryOutSize), fileID, s.backend.Size(), s.options.DiscardGranularity)
		return entryOutSize, 0
	case opGetattr, opSetattr: // SETATTR: Resize tells the kernel the size, see there
		putAttrOut(m.payload(attrOutSize), r.nodeID(), s.backend.Size(), s.options.DiscardGranularity)
		return attrOutSize, 0
	case opOpen:
		putOpenOut(m.payload(openOutSize))
		return openOutSize, 0
	case opStatfs:
		putStatfsOut(m.payload(statfsOutSize), s.backend.Size(), s.options.DiscardGranularity)
		return statfsOutSize, 0
	case opRelease:
		return 0, 0
	}
	return 0, unix.ENOSYS
}

func (s *server) read(r request, m message) (int, unix.Errno) {
	off, n := r.ioOffset(), r.ioLength()
	if n > m.room() {
		return 0, unix.EIO
	}
	got, err := s.backend.ReadAt(m.payload(n), off)
	if got < n { // io.EOF too: the device ends where the backend does
		if e := s.errno(err); e != 0 {
			return 0, e
		}
		return 0, unix.EIO
	}
	return n, 0
}

func (s *server) write(r request, m message) (int, unix.Errno) {
	off, n := r.ioOffset(), r.ioLength()
	if s.options.ReadOnly {
		return 0, unix.EROFS
	}
	got, err := s.backend.WriteAt(m.payload(n), off)
	if e := s.errno(err); e != 0 {
		return 0, e
	}
	if got < n {
		return 0, unix.EIO
	}
	return writeOutSize, 0
}

func (s *server) fallocate(r request) unix.Errno {
	off, n, mode := r.falloc()
	if s.options.ReadOnly {
		return unix.EROFS
	}
	switch mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return s.errno(s.backend.Discard(off, n))
	case unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return s.errno(s.backend.WriteZeroes(off, n))
	}
	return unix.EIO // loop sends no other
}

// errno maps a backend's error for the kernel. Some numbers would make the kernel stop asking (ENOSYS,
// EOPNOTSUPP), ask again for ever (EAGAIN, EINTR) or refuse the reply (beyond 511): they become EIO.
func (s *server) errno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	if s.options.Errno == nil {
		return unix.EIO
	}
	e := unix.Errno(s.options.Errno(err))
	switch {
	case e == 0, e >= 512, e == unix.ENOSYS, e == unix.EOPNOTSUPP, e == unix.EAGAIN, e == unix.EINTR:
		return unix.EIO
	}
	return e
}

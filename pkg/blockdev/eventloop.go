package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Direct is a Backend whose usual requests are I/O on one run of a file, which the server does by itself.
type Direct interface {
	Backend
	// DirectFile returns the descriptor of a file, open for direct I/O; false if there is none.
	DirectFile() (fd int, ok bool)
	// StartDirect begins a request under a number below DirectRequests that is free, if it is n bytes of the file at at;
	// a negative at says that zeros are to be read. If not ok, nothing has happened. It neither waits nor allocates.
	StartDirect(number int, off, n int64, write bool) (at int64, ok bool)
	// EndDirect ends a request that was begun. A failed one is made again with ReadAt or WriteAt.
	EndDirect(number int, failed bool)
}

// DirectRequests is how many requests an event loop has in hand at most.
const DirectRequests = 32

// restAfter is how long nothing has to be requested until memory is given back, in seconds; it may take twice as long.
const restAfter = 5

// eventLoop serves a connection from one thread: it reads requests as long as there are any, lets an io_uring do the I/O of
// those that need nothing else, and answers them. It waits only in the ring. The others go to threads of their own, which
// answer them by themselves.
type eventLoop struct {
	server  *server
	backend Direct
	file    int
	ring    *ring

	held    [DirectRequests]int // by request: its message
	idle    []int               // numbers of free requests
	large   []int               // free large messages, the last used on top
	landing int                 // the message that requests are read into
	flying  int                 // requests in the ring
	away    int                 // requests with the threads
	ready   bool                // there may be requests to read
	ended   bool                // the connection

	populated [smallMessages + largeMessages]bool // messages that a request may be read into
	used      bool                                // there was a request since the clock was set
	ticking   bool                                // the clock is set

	onCompleted func(userData uint64, result int32) // l.completed, made once

	slow    chan int // requests for the threads
	threads sync.WaitGroup
	wake    int // an eventfd: look at what follows

	mu      sync.Mutex    // guards what follows
	back    []int         // messages that the threads are done with
	leaving chan struct{} // nil, or closed when the device has been left
	over    bool
}

const (
	// A completion's userData is a request's number, or one of these.
	pollConnection = DirectRequests
	pollWake       = DirectRequests + 1
	clock          = DirectRequests + 2
)

// newEventLoop must be called by the thread that runs it.
func newEventLoop(s *server, b Direct) (*eventLoop, error) {
	file, ok := b.DirectFile()
	if !ok {
		return nil, errors.New("the file does no direct I/O")
	}
	r, err := newRing(2 * DirectRequests)
	if err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err == nil {
		err = unix.SetNonblock(s.conn.dev, true)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("event loop: %w", err)
	}
	l := &eventLoop{server: s, backend: b, file: file, ring: r, wake: wake, slow: make(chan int, DirectRequests)}
	l.onCompleted = l.completed
	s.messages.useHugePages()
	for i := range DirectRequests {
		l.idle = append(l.idle, i)
	}
	for i := range largeMessages {
		l.large = append(l.large, smallMessages+i)
	}
	l.land()
	return l, nil
}

// run serves until the connection ends, or is left. Then nothing calls the backend any more, unless the ring is broken: that
// is the end of the process.
func (l *eventLoop) run() (ended bool) {
	for range serverThreads {
		l.threads.Go(l.work)
	}
	l.ring.poll(l.server.conn.dev, pollConnection)
	l.ring.poll(l.wake, pollWake)
	l.startClock()
	for !l.ended && !l.left() || l.flying+l.away > 0 {
		if err := l.ring.wait(l.onCompleted); err != nil {
			if l.server.options.Broken != nil {
				l.server.options.Broken(err)
				return false
			}
			l.server.abort(err)
			break
		}
		if err := l.receiveAll(); err != nil {
			l.server.abort(err)
			l.ended = true
		}
	}
	close(l.slow)
	l.threads.Wait()
	l.ring.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leaving != nil {
		close(l.leaving)
	}
	l.over = true
	unix.Close(l.wake)
	return true
}

// receiveAll reads requests as long as there are any, and begins them.
func (l *eventLoop) receiveAll() error {
	for l.ready && !l.ended && len(l.idle) > 0 && !l.left() {
		if err := l.receive(); err != nil {
			return err
		}
	}
	if l.used && !l.ticking {
		l.startClock()
	}
	return nil
}

func (l *eventLoop) startClock() {
	l.ring.timeout(restAfter, clock)
	l.ticking = true
}

// left tells whether the device is being left.
func (l *eventLoop) left() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leaving != nil
}

// leave stops the loop from taking requests, and returns when those that it has are answered.
func (l *eventLoop) leave() {
	l.mu.Lock()
	if l.over {
		l.mu.Unlock()
		return
	}
	done := make(chan struct{})
	l.leaving = done
	l.signal()
	l.mu.Unlock()
	<-done
}

// signal wakes the loop. Called with mu held.
func (l *eventLoop) signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(l.wake, one[:])
}

// receive reads a request, and begins it.
func (l *eventLoop) receive() error {
	m := l.server.messages.at(l.landing)
	b := m.request()
	// A call that does not block: the scheduler need not know of it.
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(l.server.conn.dev), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	switch errno {
	case 0:
	case unix.EAGAIN:
		l.ready = false
		l.ring.poll(l.server.conn.dev, pollConnection)
		return nil
	case unix.EINTR:
		return nil
	case unix.ENOENT: // the request was withdrawn
		m.clear()
		return nil
	case unix.ENODEV:
		l.ended = true
		return nil
	default:
		return fmt.Errorf("read FUSE request: %w", errno)
	}
	r := request(b[:n])
	if !r.valid() {
		return fmt.Errorf("malformed FUSE request of %d bytes", n)
	}
	if !r.wantsReply() {
		m.clear()
		return nil
	}
	l.used = true
	l.server.waiting.Add(1)
	i := l.idle[len(l.idle)-1]
	l.idle = l.idle[:len(l.idle)-1]
	l.hold(i, r)
	if !l.startDirect(i) {
		l.toThreads(i)
	}
	return nil
}

// hold finds a message for request i, which was read, and makes room for the next one.
func (l *eventLoop) hold(i int, r request) {
	landing, room := l.server.messages.at(l.landing), len(r)-headRoom
	if r.opcode() == opRead {
		room = r.ioLength()
	}
	switch {
	case room <= smallPayload:
		l.held[i] = i
	case r.opcode() == opRead:
		l.held[i] = l.popLarge()
	default: // it stays where it is
		l.held[i] = l.landing
		l.land()
		return
	}
	l.server.messages.at(l.held[i]).take(r)
	landing.clear()
}

func (l *eventLoop) popLarge() int {
	number := l.large[len(l.large)-1]
	l.large = l.large[:len(l.large)-1]
	return number
}

// land takes another message to read into.
func (l *eventLoop) land() {
	l.landing = l.popLarge()
	if !l.populated[l.landing] {
		l.server.messages.at(l.landing).populate(l.server.conn.payload)
		l.populated[l.landing] = true
	}
}

// free ends request i, which was answered.
func (l *eventLoop) free(i int) {
	l.server.waiting.Add(-1)
	l.idle = append(l.idle, i)
	if l.held[i] >= smallMessages {
		l.large = append(l.large, l.held[i])
	}
}

// startDirect gives a request to the ring if it can, or answers what is known.
func (l *eventLoop) startDirect(i int) bool {
	m := l.message(i)
	r := m.held()
	op := r.opcode()
	write := op == opWrite
	if op != opRead && !write || write && l.server.options.ReadOnly {
		return false
	}
	n := r.ioLength()
	if n > m.room() {
		return false
	}
	at, ok := l.backend.StartDirect(i, r.ioOffset(), int64(n), write)
	if !ok {
		return false
	}
	if at < 0 {
		clear(m.payload(n))
		l.endDirect(i, n)
		return true
	}
	ringOp := uint8(ringOpRead)
	if write {
		ringOp = ringOpWrite
	}
	l.ring.transfer(ringOp, l.file, m.payload(n), at, uint64(i))
	l.flying++
	return true
}

func (l *eventLoop) message(i int) message { return l.server.messages.at(l.held[i]) }

// completed takes what the ring has done.
func (l *eventLoop) completed(userData uint64, result int32) {
	switch userData {
	case pollConnection:
		l.ready = true
	case pollWake:
		l.awake()
	case clock:
		l.tick()
	default:
		l.flying--
		l.endDirect(int(userData), int(result))
	}
}

// tick gives memory back when there has been nothing to do for a while. Then the clock stands still.
func (l *eventLoop) tick() {
	l.ticking = false
	if l.used || l.flying+l.away > 0 {
		l.used = false
		l.startClock()
		return
	}
	l.server.messages.giveBack(l.landing)
	landing := l.populated[l.landing]
	clear(l.populated[:])
	l.populated[l.landing] = landing
}

// endDirect answers a request whose I/O is done. One that has failed is made again, by a thread, which knows what the
// failure means. The request itself is still in its message.
func (l *eventLoop) endDirect(i, result int) {
	m := l.message(i)
	r := m.held()
	n := r.ioLength()
	l.backend.EndDirect(i, result != n)
	if result != n {
		l.toThreads(i)
		return
	}
	if r.opcode() == opWrite {
		n = writeOutSize
	}
	l.reply(m.conclude(n, 0))
	m.clear()
	l.free(i)
}

func (l *eventLoop) reply(b []byte) {
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(l.server.conn.dev), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case unix.EINTR, unix.EAGAIN:
			continue
		case 0, unix.ENOENT, unix.ENODEV, unix.ENOTCONN: // an error: nobody waits for it any more
		default:
			klog.ErrorS(errno, "FUSE reply was refused", "device", l.server.options.Name)
		}
		return
	}
}

func (l *eventLoop) toThreads(i int) {
	l.away++
	l.slow <- i // as many as there are requests fit
}

// work answers requests until there are no more.
func (l *eventLoop) work() {
	runtime.LockOSThread() // never unlocked, see server.run
	beFlusher()
	for i := range l.slow {
		if err := l.server.answer(l.message(i)); err != nil {
			l.server.abort(err)
		}
		l.mu.Lock()
		l.back = append(l.back, i)
		l.signal()
		l.mu.Unlock()
	}
}

// awake takes back what the threads are done with, and notices when the device is left.
func (l *eventLoop) awake() {
	var b [8]byte
	_, _ = unix.Read(l.wake, b[:])
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away -= len(l.back)
	for _, i := range l.back {
		l.free(i)
	}
	l.back = l.back[:0]
	l.ring.poll(l.wake, pollWake)
}

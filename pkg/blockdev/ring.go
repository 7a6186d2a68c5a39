package blockdev

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is an io_uring (linux/io_uring.h) for one thread: as much of it as reads, writes and polls need.
type ring struct {
	fd      int
	rings   []byte // the shared memory with heads and tails
	entries []byte // the memory of sqes

	sqTail, sqMask         *uint32
	sqArray                []uint32
	sqes                   []sqe
	cqHead, cqTail, cqMask *uint32
	cqes                   []cqe

	tail    uint32 // of what was put
	pending uint32 // put, and not yet submitted

	time [2]int64 // of the last timeout that was put: seconds, nanoseconds
}

// sqe is a submission.
type sqe struct {
	opcode, flags uint8
	priority      uint16
	fd            int32
	offset, addr  uint64
	length        uint32
	opFlags       uint32
	userData      uint64
	_             [3]uint64
}

// cqe is a completion.
type cqe struct {
	userData uint64
	result   int32 // or -errno
	flags    uint32
}

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wqFD uint32
	_                                                      [3]uint32

	sq struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

const (
	ringSingleIssuer = 1 << 12
	ringDeferTasks   = 1 << 13
	ringGetEvents    = 1 << 0

	ringOffsetRings   = 0
	ringOffsetEntries = 0x10000000

	ringOpPoll    = 6
	ringOpTimeout = 11
	ringOpRead    = 22
	ringOpWrite   = 23
)

// tryRing tells why there can be no ring.
func tryRing() error {
	r, err := newRing(1)
	if err == nil {
		r.close()
	}
	return err
}

// newRing makes a ring for the calling thread, with room for n submissions. It fails where io_uring is disabled, or the
// kernel is older than 6.1.
func newRing(n uint32) (*ring, error) {
	p := ringParams{flags: ringSingleIssuer | ringDeferTasks}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r := &ring{fd: int(fd)}
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes)+int(p.cqEntries)*int(unsafe.Sizeof(cqe{})))
	var err error
	if r.rings, err = r.mmap(ringOffsetRings, size); err == nil {
		r.entries, err = r.mmap(ringOffsetEntries, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})))
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("map io_uring: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqTail, r.sqMask = at(p.sq.tail), at(p.sq.mask)
	r.cqHead, r.cqTail, r.cqMask = at(p.cq.head), at(p.cq.tail), at(p.cq.mask)
	r.sqArray = unsafe.Slice(at(p.sq.array), p.sqEntries)
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&r.entries[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	r.tail = *r.sqTail
	return r, nil
}

func (r *ring) mmap(off int64, n int) ([]byte, error) {
	return unix.Mmap(r.fd, off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// close ends the ring. What it still has to do is ended by the kernel, some time later.
func (r *ring) close() {
	_ = unix.Munmap(r.rings)
	_ = unix.Munmap(r.entries)
	unix.Close(r.fd)
}

// put adds a submission. There is room for as many as newRing was told, between two calls of wait.
func (r *ring) put(s sqe) {
	i := r.tail & *r.sqMask
	r.sqArray[i] = i
	r.sqes[i] = s
	r.tail++
	r.pending++
}

// transfer adds a read or write of p at off.
func (r *ring) transfer(op uint8, fd int, p []byte, off int64, userData uint64) {
	r.put(sqe{
		opcode: op, fd: int32(fd), offset: uint64(off), addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))),
		length: uint32(len(p)), userData: userData,
	})
}

// poll adds a wait, for once, until fd can be read.
func (r *ring) poll(fd int, userData uint64) {
	r.put(sqe{opcode: ringOpPoll, fd: int32(fd), opFlags: unix.POLLIN, userData: userData})
}

// timeout adds a wait for some seconds. There may be one between two calls of wait.
func (r *ring) timeout(seconds int64, userData uint64) {
	r.time = [2]int64{seconds}
	r.put(sqe{opcode: ringOpTimeout, fd: -1, addr: uint64(uintptr(unsafe.Pointer(&r.time))), length: 1, userData: userData})
}

// wait submits what was added, waits until something has completed, and calls fn with all that has.
func (r *ring) wait(fn func(userData uint64, result int32)) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.pending), 1, ringGetEvents, 0, 0)
		if errno == 0 {
			r.pending -= uint32(n)
			break
		}
		if !errors.Is(errno, unix.EINTR) && !errors.Is(errno, unix.EAGAIN) && !errors.Is(errno, unix.EBUSY) {
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
	head := *r.cqHead
	for tail := atomic.LoadUint32(r.cqTail); head != tail; head++ {
		c := r.cqes[head&*r.cqMask]
		fn(c.userData, c.result)
	}
	atomic.StoreUint32(r.cqHead, head)
	return nil
}

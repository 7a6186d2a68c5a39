package blockdev

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// message is the memory for one request and its reply. The data of a WRITE and of a READ's answer are at the same
// page-aligned place; the heads before it overlap, but the reply's leaves what is needed of the request. What it holds is
// understood by whoever finds it when the server has died: see journal.go.
//
//	page-88 u64 the outcome, 0 until there is one
//	page-80 the request, whose first word is its length, 0 if there is none
//	page-16 the reply's header
//	page    the data
type message []byte

const outcomeSize = 8

// outcomeKnown is set in every outcome: errno << 32 | length of the reply's payload.
const outcomeKnown = 1 << 63

func (m message) request() []byte      { return m[unix.Getpagesize()-headRoom:] }
func (m message) payload(n int) []byte { return m[unix.Getpagesize():][:n] }
func (m message) room() int            { return len(m) - unix.Getpagesize() }

func (m message) length() *uint32 {
	return (*uint32)(unsafe.Pointer(&m[unix.Getpagesize()-headRoom]))
}

func (m message) outcome() *uint64 {
	return (*uint64)(unsafe.Pointer(&m[unix.Getpagesize()-headRoom-outcomeSize]))
}

// held returns the request that the message has.
func (m message) held() request { return request(m.request()[:*m.length()]) }

// take copies a request that was read into another message. Its length comes last: from then on it is held.
func (m message) take(r request) {
	copy(m.request()[4:], r[4:])
	atomic.StoreUint32(m.length(), binary.NativeEndian.Uint32(r))
}

// conclude notes how the request has ended, and returns the reply with n bytes of payload. Only then does the reply
// overwrite anything.
func (m message) conclude(n int, errno unix.Errno) []byte {
	if errno != 0 {
		n = 0
	}
	atomic.StoreUint64(m.outcome(), outcomeKnown|uint64(errno)<<32|uint64(n))
	return m.reply()
}

// reply makes the reply of a request that was concluded.
func (m message) reply() []byte {
	outcome := *m.outcome()
	n, errno := int(uint32(outcome)), unix.Errno(outcome&^outcomeKnown>>32)
	r := request(m.request())
	if r.opcode() == opWrite && errno == 0 {
		putWriteOut(m.payload(writeOutSize), r.ioLength())
	}
	b := m[unix.Getpagesize()-outHeaderSize:][:outHeaderSize+n]
	putOutHeader(b, len(b), errno, r.unique())
	return b
}

// clear makes the message free: first of the request, for one that is held and has no outcome is carried out again.
func (m message) clear() {
	atomic.StoreUint32(m.length(), 0)
	atomic.StoreUint64(m.outcome(), 0)
}

// populate gives the message its memory, for requests with up to n bytes of data. It must be free.
func (m message) populate(n int) {
	b := m[:unix.Getpagesize()+n]
	if unix.Madvise(b, unix.MADV_POPULATE_WRITE) != nil { // before Linux 5.14
		clear(b)
	}
}

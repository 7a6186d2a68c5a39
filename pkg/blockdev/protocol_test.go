package blockdev

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// newRequest makes a request with arguments of n bytes.
func newRequest(op uint32, n int) request {
	r := make(request, inHeaderSize+n)
	binary.NativeEndian.PutUint32(r, uint32(len(r)))
	binary.NativeEndian.PutUint32(r[4:], op)
	binary.NativeEndian.PutUint64(r[8:], 42)
	return r
}

// kernelSide returns a connection and the end of it where the kernel would be.
func kernelSide(t *testing.T) (*connection, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return &connection{dev: fds[0]}, fds[1]
}

func TestNegotiation(t *testing.T) {
	const all = flagAsyncDIO | flagMaxPages | flagBigWrites | flagAsyncRead
	for _, c := range []struct {
		what                string
		op                  uint32
		major, minor, flags uint32
		ok                  bool
	}{
		{"all there", opInit, 7, 31, all, true},
		{"a newer kernel", opInit, 7, 99, 0xffffffff, true},
		{"no asynchronous direct I/O", opInit, 7, 31, all &^ flagAsyncDIO, false},
		{"no large requests", opInit, 7, 31, all &^ flagMaxPages, false},
		{"an old kernel", opInit, 7, 27, all, false},
		{"another protocol", opInit, 8, 31, all, false},
		{"not INIT", opLookup, 7, 31, all, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			conn, kernel := kernelSide(t)
			r := newRequest(c.op, 64)
			for i, v := range []uint32{c.major, c.minor, 4096, c.flags} {
				binary.NativeEndian.PutUint32(r.args()[4*i:], v)
			}
			_, err := unix.Write(kernel, r)
			must(t, err)
			conn.payload = maxPayload
			err = conn.negotiate()
			if (err == nil) != c.ok {
				t.Fatalf("negotiate: %v", err)
			}
			if !c.ok {
				return
			}
			reply := make([]byte, 4096)
			n, err := unix.Read(kernel, reply)
			must(t, err)
			if n != outHeaderSize+initOutSize {
				t.Fatalf("reply of %d bytes", n)
			}
			out := reply[outHeaderSize:]
			if flags := binary.NativeEndian.Uint32(out[12:]); flags != all {
				t.Errorf("flags %#x", flags)
			}
			if bg := binary.NativeEndian.Uint16(out[16:]); bg != 256 {
				t.Errorf("max_background %d", bg)
			}
			if pages := int(binary.NativeEndian.Uint16(out[28:])); pages*unix.Getpagesize() != 1<<20 {
				t.Errorf("max_pages %d", pages)
			}
		})
	}
}

// TestMalformedRequests: nothing is read beyond what the kernel has sent.
func TestMalformedRequests(t *testing.T) {
	for _, op := range []uint32{opRead, opWrite, opFallocate, opInit, opLookup, opGetattr, 9999} {
		for n := range 80 {
			r := newRequest(op, n)
			if op == opWrite && n >= writeInSize {
				binary.NativeEndian.PutUint32(r.args()[16:], uint32(n-writeInSize))
			}
			if !r.valid() {
				continue
			}
			// Must not panic.
			switch op {
			case opRead, opWrite:
				r.ioOffset()
				if got := r.ioLength(); op == opWrite && got != n-writeInSize {
					t.Errorf("length %d of %d", got, n)
				}
			case opFallocate:
				r.falloc()
			case opInit:
				r.init()
			case opLookup:
				r.name()
			}
		}
	}
	for n := range inHeaderSize {
		if make(request, n).valid() {
			t.Errorf("%d bytes are a request", n)
		}
	}
	r := newRequest(opWrite, writeInSize+512)
	binary.NativeEndian.PutUint32(r.args()[16:], 1024) // more than was sent
	if r.valid() {
		t.Error("a WRITE without its data is valid")
	}
	r = newRequest(opRead, 40)
	binary.NativeEndian.PutUint32(r, 4096)
	if r.valid() {
		t.Error("a truncated request is valid")
	}
}

// newMessage returns a large one.
func newMessage() message {
	return make(message, messageOffset(smallMessages+1)-messageOffset(smallMessages))
}

// TestUnknownOperations: answered, and the ones that want no answer not.
func TestUnknownOperations(t *testing.T) {
	conn, kernel := kernelSide(t)
	s := &server{conn: conn, backend: newBackend(t, 1<<20)}
	m := newMessage()
	for _, c := range []struct {
		op    uint32
		errno unix.Errno
	}{{22, unix.ENOSYS}, {opInterrupt, unix.ENOSYS}, {9999, unix.ENOSYS}, {opLookup, unix.ENOENT}, {opFallocate, unix.EIO}} {
		for _, silent := range []uint32{opForget, opBatchForget} {
			_, err := unix.Write(kernel, newRequest(silent, 16))
			must(t, err)
			must(t, s.serveOne(m))
		}
		_, err := unix.Write(kernel, newRequest(c.op, 32))
		must(t, err)
		must(t, s.serveOne(m))
		reply := make([]byte, 4096)
		n, err := unix.Read(kernel, reply)
		must(t, err)
		errno := -int32(binary.NativeEndian.Uint32(reply[4:]))
		if n != outHeaderSize || binary.NativeEndian.Uint64(reply[8:]) != 42 || unix.Errno(errno) != c.errno {
			t.Errorf("operation %d: reply %v", c.op, reply[:n])
		}
	}
}

package blockdev

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// The test plays a server that dies: it reads a write from the connection, and stops at each step on the way to its answer.
func TestJournal(t *testing.T) {
	const off = 64 << 10
	for _, direct := range []bool{true, false} {
		for _, c := range []struct {
			what     string
			n        int
			die      func(s *server, b Backend, m message)
			answered bool // already: it must not be carried out again
		}{
			{"read", 4096, func(*server, Backend, message) {}, false},
			{"read, large", 256 << 10, func(*server, Backend, message) {}, false},
			{"copied", 4096, func(s *server, _ Backend, m message) { s.messages.at(3).take(m.held()) }, false},
			{"moved", smallPayload, func(s *server, _ Backend, m message) {
				s.messages.at(3).take(m.held())
				m.clear()
			}, false},
			{"carried out in part", 8192, func(_ *server, b Backend, m message) {
				_, err := b.WriteAt(m.payload(4096), off)
				must(t, err)
			}, false},
			{"concluded", 4096, func(_ *server, _ Backend, m message) { m.conclude(writeOutSize, 0) }, true},
			{"answered", 4096, func(s *server, _ Backend, m message) {
				must(t, s.conn.send(m.conclude(writeOutSize, 0)))
			}, true},
			{"answered, large", 256 << 10, func(s *server, _ Backend, m message) {
				must(t, s.conn.send(m.conclude(writeOutSize, 0)))
			}, true},
			{"half cleared", 4096, func(s *server, _ Backend, m message) {
				must(t, s.conn.send(m.conclude(writeOutSize, 0)))
				atomic.StoreUint32(m.length(), 0)
			}, true},
			{"cleared", 4096, func(s *server, _ Backend, m message) {
				must(t, s.conn.send(m.conclude(writeOutSize, 0)))
				m.clear()
			}, true},
		} {
			t.Run(fmt.Sprintf("%s, event loop %t", c.what, direct), func(t *testing.T) {
				b := newDirectBackend(t, 4<<20)
				o := Options{Name: deviceName(t.Name()), Journal: true}
				d, err := Attach(b, o)
				must(t, err)
				f := directIO(t, d.Path())
				before, p, got := aligned(c.n), aligned(c.n), aligned(c.n)
				stamp(before, off, 1)
				_, err = f.WriteAt(before, off)
				must(t, err)

				d.Leave()
				stamp(p, off, 2)
				written := make(chan error, 1)
				go func() {
					_, err := f.WriteAt(p, off)
					written <- err
				}()
				m := d.server.messages.at(smallMessages + 5)
				r, err := d.conn.receive(m)
				must(t, err)
				if !r.valid() || r.opcode() != opWrite || r.ioLength() != c.n {
					t.Fatalf("read operation %d of %d bytes", r.opcode(), len(r))
				}
				c.die(d.server, b, m)
				h := copyHandle(t, d)
				d.conn.close()
				d.loop.close()
				d.server.close()

				var next Backend = b
				if !direct {
					next = b.testBackend
				}
				if d, err = Resume(next, o, h); err != nil {
					t.Fatal(err)
				}
				must(t, <-written)
				want := p
				if c.answered {
					want = before
				}
				if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("read: %v, or something else", err)
				}
				must(t, f.Close())
				must(t, d.Detach())
			})
		}
	}
}

// Whatever is in the memory, it is answered or refused.
func TestMalformedJournal(t *testing.T) {
	conn, _ := kernelSide(t)
	ms, err := newMessages(true)
	must(t, err)
	t.Cleanup(ms.close)
	s := newServer(newBackend(t, 1<<20), Options{}, ms)
	s.conn = conn
	must(t, s.replay())
	for _, spoil := range []func(m message){
		func(m message) { *m.length() = 8 },
		func(m message) { *m.length() = 1 << 31 },
		func(m message) { *m.outcome() = outcomeKnown | 1<<30 },
	} {
		for _, i := range []int{0, smallMessages} {
			m := ms.at(i)
			spoil(m)
			if err := s.replay(); err == nil {
				t.Error("a malformed journal was replayed")
			}
			m.clear()
		}
	}
	h := Handle{State: []byte(`{"version":1,"journal":2}`), FDs: []int{-1, -1, -1, -1}}
	if _, err := Resume(newBackend(t, 1<<20), Options{Name: "x"}, h); err == nil {
		t.Error("resumed from nothing")
	}
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	if _, err := openMessages(fd); err == nil {
		t.Error("an empty file was taken for messages")
	}
}

package blockdev

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directBackend lets the server do the I/O of most requests.
type directBackend struct {
	*testBackend
	direct *os.File

	begun, ended, failed atomic.Int64
	// misdirect makes the I/O of some fail: past the end of what the file system can hold.
	misdirect atomic.Bool
	// zeros makes all be read as zeros.
	zeros atomic.Bool
}

func newDirectBackend(t *testing.T, size int64) *directBackend {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "direct") // a file system in memory does no direct I/O
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &directBackend{testBackend: openBackend(t, filepath.Join(dir, "volume"), size)}
	b.direct = openDevice(t, b.file.Name(), os.O_RDWR|unix.O_DIRECT)
	// All of the file's I/O goes the same way.
	b.file = b.direct
	return b
}

func (b *directBackend) DirectFile() (int, bool) { return int(b.direct.Fd()), true }

func (b *directBackend) StartDirect(number int, off, n int64, write bool) (int64, bool) {
	zeros := b.zeros.Load() && !write
	if number < 0 || number >= DirectRequests || off/4096%5 == 4 && !zeros {
		return 0, false
	}
	b.begun.Add(1)
	if zeros {
		return -1, true
	}
	if b.misdirect.Load() && off/4096%3 == 0 {
		return 1 << 62, true
	}
	return off, true
}

func (b *directBackend) EndDirect(_ int, failed bool) {
	b.ended.Add(1)
	if failed {
		b.failed.Add(1)
	}
}

// TestDirect: requests that the server does by itself, others, and those that fail at first, beside each other.
func TestDirect(t *testing.T) {
	const size, parts = 16 << 20, 8
	b := newDirectBackend(t, size)
	d := attach(t, b, Options{})
	if d.server.loop == nil {
		t.Fatal("there is no event loop")
	}
	for _, misdirect := range []bool{false, true} {
		b.misdirect.Store(misdirect)
		var users sync.WaitGroup
		for part := range int64(parts) {
			f := directIO(t, d.Path())
			users.Go(func() {
				for _, n := range []int64{512, 4096, 12 << 10, 256 << 10, 1 << 20} {
					p, got := aligned(int(n)), aligned(int(n))
					for off := part * size / parts; off+n <= (part+1)*size/parts; off += max(n, 64<<10) + 4096 {
						stamp(p, off, byte(n>>9))
						if _, err := f.WriteAt(p, off); err != nil {
							t.Errorf("write %d at %d: %v", n, off, err)
							return
						}
						if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
							t.Errorf("read %d at %d: %v, or something else", n, off, err)
							return
						}
					}
					if err := f.Sync(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		users.Wait()
	}
	b.zeros.Store(true)
	for _, n := range []int{4096, 1 << 20} {
		got := aligned(n)
		if _, err := directIO(t, d.Path()).ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, n)) {
			t.Errorf("read %d bytes of zeros: %v, or something else", n, err)
		}
	}
	b.zeros.Store(false)
	if b.begun.Load() == 0 || b.failed.Load() == 0 {
		t.Errorf("%d begun, %d failed: this test proves nothing", b.begun.Load(), b.failed.Load())
	}
	if b.begun.Load() != b.ended.Load() {
		t.Errorf("%d begun, %d ended", b.begun.Load(), b.ended.Load())
	}
	b.failWith(func(op string) error { return unix.ENOSPC })
	_, err := directIO(t, d.Path()).ReadAt(aligned(4096), 0) // fails twice
	if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("read: %v", err)
	}
	b.heal()
}

// leave leaves a device, and its descriptors to whoever resumes it.
func leave(t *testing.T, d *Device) Handle {
	t.Helper()
	d.Leave()
	h := copyHandle(t, d)
	d.conn.close() // as the end of the process would
	d.loop.close()
	d.server.close()
	return h
}

// copyHandle returns the handle of a device that may end before it is used.
func copyHandle(t *testing.T, d *Device) Handle {
	t.Helper()
	h, err := d.Handle()
	must(t, err)
	for i, fd := range h.FDs {
		h.FDs[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		must(t, err)
	}
	h.Loop, err = unix.FcntlInt(uintptr(d.loop.fd), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	return h
}

// A device that is left can be resumed: what nobody has answered is answered then. (Another process would: here the loop of
// the first has ended, too.)
func TestLeaveAndResume(t *testing.T) {
	const size = 4 << 20
	b := newDirectBackend(t, size)
	o := Options{Name: deviceName(t.Name())}
	d, err := Attach(b, o)
	must(t, err)
	f := directIO(t, d.Path())
	stop := make(chan struct{})
	var users sync.WaitGroup
	var done atomic.Int64
	for i := range int64(4) {
		users.Go(func() {
			p, got := aligned(64<<10), aligned(64<<10)
			for n := byte(0); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				stamp(p, i<<20, n)
				if _, err := f.WriteAt(p, i<<20); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				if _, err := f.ReadAt(got, i<<20); err != nil || !bytes.Equal(got, p) {
					t.Errorf("read: %v, or something else", err)
					return
				}
				done.Add(1)
			}
		})
	}
	for range 20 {
		from := done.Load()
		waitFor(t, "requests", func() bool { return t.Failed() || done.Load() > from+8 })
		h := leave(t, d)
		if b.begun.Load() != b.ended.Load() {
			t.Error("left with requests in hand")
		}
		if d, err = Resume(b, o, h); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	users.Wait()
	must(t, f.Close())
	must(t, d.Detach())
	if _, err := Resume(b, o, Handle{State: []byte("{}")}); err == nil {
		t.Error("resumed from nothing")
	}
}

// Memory that requests have used is given back when there are none, and taken again.
func TestGiveBack(t *testing.T) {
	t.Parallel()
	t.Run("anonymous", func(t *testing.T) { testGiveBack(t, Options{}) })
	t.Run("journal", func(t *testing.T) { testGiveBack(t, Options{Journal: true}) })
}

func testGiveBack(t *testing.T, o Options) {
	t.Helper()
	t.Parallel()
	const size = 16 << 20
	b := newDirectBackend(t, size)
	d := attach(t, b, o)
	memory := func() int64 { return resident(t, d.server.messages.memory) }
	const idle = 1<<20 + 4096 // what requests are read into
	for range 2 {
		var users sync.WaitGroup
		for i := range int64(8) {
			f := directIO(t, d.Path())
			users.Go(func() {
				p, got := aligned(1<<20), aligned(1<<20)
				stamp(p, i, 1)
				if _, err := f.WriteAt(p, i<<20); err != nil {
					t.Errorf("write: %v", err)
				}
				if _, err := f.ReadAt(got, i<<20); err != nil || !bytes.Equal(got, p) {
					t.Errorf("read: %v, or something else", err)
				}
			})
		}
		users.Wait()
		if n := memory(); n <= 2*idle {
			t.Errorf("%d bytes in use: this test proves nothing", n)
		}
		waitFor(t, "memory is given back", func() bool { return memory() <= idle })
	}
}

// resident returns how many bytes of a mapping have memory.
func resident(t *testing.T, b []byte) (n int64) {
	t.Helper()
	pages := make([]byte, len(b)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += int64(p&1) * int64(os.Getpagesize())
	}
	return n
}

// Without its ring the server does not know what became of its requests: it says so, and the next one carries them out.
func TestBrokenRing(t *testing.T) {
	b := newDirectBackend(t, 4<<20)
	broken := make(chan error, 1)
	o := Options{Name: deviceName(t.Name()), Broken: func(err error) { broken <- err }}
	d, err := Attach(b, o)
	must(t, err)
	f := directIO(t, d.Path())
	p, got := aligned(4096), aligned(4096)
	stamp(p, 0, 1)
	h := copyHandle(t, d)
	null := openDevice(t, os.DevNull, os.O_RDONLY)
	must(t, unix.Dup3(int(null.Fd()), d.server.loop.ring.fd, unix.O_CLOEXEC))
	written := make(chan error, 1)
	go func() {
		_, err := f.WriteAt(p, 0)
		written <- err
	}()
	if err := <-broken; !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("broken: %v", err)
	}
	select {
	case <-d.Done():
		t.Error("done, with a request in hand")
	default:
	}
	d.conn.close()
	d.loop.close()
	if d, err = Resume(b, o, h); err != nil {
		t.Fatal(err)
	}
	must(t, <-written)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read: %v, or something else", err)
	}
	must(t, f.Close())
	must(t, d.Detach())
}

package blockdev

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctlPointer[T any](f *os.File, request uint, p *T) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(p)))
	if e != 0 {
		return e
	}
	return nil
}

func TestDetachWhileMounted(t *testing.T) {
	b := newBackend(t, 64<<20)
	d := attach(t, b, Options{})
	run(t, "mkfs.ext4", "-q", d.Path())
	dir := t.TempDir()
	mount(t, d.Path(), dir, "ext4")
	for range 3 {
		wantErr(t, "detach", d.Detach(), ErrBusy)
	}
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, bytes.Repeat([]byte("x"), 1<<20), 0o600))
	unix.Sync()
	must(t, unix.Unmount(dir, 0))
	mount(t, d.Path(), dir, "ext4") // a refused Detach has left no mark that unbinds it at the last close
	got, err := os.ReadFile(file)
	must(t, err)
	if len(got) != 1<<20 {
		t.Error("the file system has lost a file")
	}
	must(t, unix.Unmount(dir, 0))
	must(t, d.Detach())
	must(t, d.Detach())
	if err := d.Resize(); err == nil {
		t.Error("a detached device was resized")
	}
}

func TestDetachWhileOpen(t *testing.T) {
	b := newBackend(t, 4<<20)
	d := attach(t, b, Options{})
	for _, flags := range []int{os.O_RDONLY, os.O_RDWR, os.O_RDONLY | unix.O_EXCL} {
		f := openDevice(t, d.Path(), flags)
		wantErr(t, "detach", d.Detach(), ErrBusy)
		if got := sysfs(t, d.Path(), "loop/autoclear"); got != "0" {
			t.Error("a refused Detach has left its mark")
		}
		must(t, f.Close())
		fill(t, d.Path(), 4<<20)
	}
	must(t, d.Detach())
}

// TestDetachWaitsForProbes: programs that open each device that appears, for an instant, do not hinder.
func TestDetachWaitsForProbes(t *testing.T) {
	for range 5 {
		d := attach(t, newBackend(t, 1<<20), Options{})
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						if fd, err := unix.Open(d.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
							unix.Close(fd)
						}
					}
				}
			})
		}
		var err error
		for range 100 { // three that never pause may well be seen at each look
			if err = d.Detach(); !errors.Is(err, ErrBusy) {
				break
			}
		}
		close(stop)
		wg.Wait()
		must(t, err)
	}
}

// TestDetachKeepsPageCache: what was written through the page cache and never synced is in the backend
// when Detach has returned nil, also if the writer's close falls into Detach.
func TestDetachKeepsPageCache(t *testing.T) {
	want := make([]byte, 64<<10)
	stamp(want, 0, 9)
	b := newBackend(t, int64(len(want)))
	for range 60 {
		must(t, b.file.Truncate(0))
		b.grow(t, int64(len(want)))
		d := attach(t, b, Options{})
		f := openDevice(t, d.Path(), os.O_WRONLY)
		_, err := f.Write(want)
		must(t, err)
		var wg sync.WaitGroup
		wg.Go(func() {
			closeAt := time.Now().Add(rand.N(100 * time.Microsecond))
			for time.Now().Before(closeAt) { // a timer is not that fine
				runtime.Gosched()
			}
			f.Close()
		})
		err = d.Detach()
		for errors.Is(err, ErrBusy) {
			err = d.Detach()
		}
		wg.Wait()
		must(t, err)
		got, err := os.ReadFile(b.file.Name())
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatal("Detach has lost what was in the page cache")
		}
	}
}

// TestNumberOfAnother: when the kernel has given the number of our device to somebody else, that one stays.
func TestNumberOfAnother(t *testing.T) {
	d := attach(t, newBackend(t, 1<<20), Options{Name: deviceName("ours")})
	other := attach(t, newBackend(t, 1<<20), Options{Name: deviceName("other")})
	differently, same := other.loop, other.loop
	differently.fileDev, differently.filePath = d.loop.fileDev, d.loop.filePath
	same.fileDev = d.loop.fileDev // the same volume, attached again
	for _, l := range []loopDevice{differently, same} {
		wantErr(t, "mark", l.markAutoclear(), errUnbound)
		must(t, l.clear())
		wantErr(t, "keep", l.keep(), errUnbound)
		wantErr(t, "set capacity", l.setCapacity(1<<20), errUnbound)
		if got := sysfs(t, other.Path(), "loop/autoclear"); got != "0" {
			t.Error("somebody else's device was marked")
		}
	}
	fill(t, other.Path(), 1<<20)
}

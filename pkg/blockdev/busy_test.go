package blockdev

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
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
// when Detach has returned nil, also if the writer's close and Detach cross.
func TestDetachKeepsPageCache(t *testing.T) {
	const size = 1 << 20
	want := make([]byte, size)
	stamp(want, 0, 9)
	for range 50 {
		b := newBackend(t, size)
		d := attach(t, b, Options{})
		f := openDevice(t, d.Path(), os.O_WRONLY)
		var wg sync.WaitGroup
		wg.Go(func() {
			for off := 0; off < size; off += 4096 {
				if _, err := f.Write(want[off:][:4096]); err != nil {
					t.Error(err)
					break
				}
			}
			f.Close()
		})
		err := d.Detach()
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

// TestDetachIsNotFooled: when the kernel has given the number of our device to somebody else, that one stays.
func TestDetachIsNotFooled(t *testing.T) {
	d := attach(t, newBackend(t, 1<<20), Options{})
	run(t, "losetup", "-d", d.Path())
	waitFor(t, "the device to be free", func() bool { return backingFile(d.loop.number) == "" })
	other, err := os.Create(filepath.Join(t.TempDir(), "other"))
	must(t, err)
	defer other.Close()
	must(t, other.Truncate(1<<20))
	fd, err := openLoop(d.loop.number, unix.O_RDWR)
	must(t, err)
	defer unix.Close(fd)
	err = unix.IoctlLoopConfigure(fd, &unix.LoopConfig{Fd: uint32(other.Fd())})
	if errors.Is(err, unix.EBUSY) {
		t.Skip("another process was faster to take the number")
	}
	must(t, err)
	must(t, d.Detach())
	must(t, d.Abort())
	if backingFile(d.loop.number) != other.Name() {
		t.Error("somebody else's device was removed")
	}
	must(t, unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0))
}

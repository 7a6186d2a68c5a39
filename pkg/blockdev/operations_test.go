package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDiscardAndZeroes(t *testing.T) {
	const size, granularity = 12 << 20, 1 << 16
	b := newBackend(t, size)
	d := attach(t, b, Options{DiscardGranularity: granularity})
	fill(t, d.Path(), size)
	b.spans()

	run(t, "blkdiscard", "-o", "1048576", "-l", "4194304", d.Path())
	discarded, zeroed := b.spans()
	if total(discarded) != 4<<20 || discarded[0].off != 1<<20 || len(zeroed) != 0 {
		t.Errorf("blkdiscard: discarded %v, zeroed %v", discarded, zeroed)
	}
	run(t, "blkdiscard", "-z", "-o", "8388608", "-l", "2097152", d.Path())
	discarded, zeroed = b.spans()
	if total(zeroed) != 2<<20 || zeroed[0].off != 8<<20 || len(discarded) != 0 {
		t.Errorf("blkdiscard -z: discarded %v, zeroed %v", discarded, zeroed)
	}

	want := make([]byte, size)
	stamp(want, 0, 3)
	clear(want[1<<20:][:4<<20])
	clear(want[8<<20:][:2<<20])
	got := aligned(size)
	_, err := io.ReadFull(directIO(t, d.Path()), got)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("wrong content after discard and write-zeroes")
	}
}

func fill(t *testing.T, path string, size int) {
	t.Helper()
	buf := aligned(size)
	stamp(buf, 0, 3)
	f := directIO(t, path)
	_, err := f.WriteAt(buf, 0)
	must(t, err)
	must(t, f.Close())
}

// TestHugeDiscard: the kernel asks for up to 4 GiB at once.
func TestHugeDiscard(t *testing.T) {
	b := newBackend(t, 9<<30)
	d := attach(t, b, Options{})
	run(t, "blkdiscard", d.Path())
	discarded, _ := b.spans()
	if total(discarded) != 9<<30 || len(discarded) > 16 {
		t.Errorf("discarded %d bytes in %d pieces", total(discarded), len(discarded))
	}
}

func TestFlush(t *testing.T) {
	b := newBackend(t, 1<<20)
	d := attach(t, b, Options{})
	f := directIO(t, d.Path())
	_, err := f.WriteAt(aligned(4096), 0)
	must(t, err)
	for range 3 { // every time: the kernel has not come to think that there is nothing to flush
		before := b.flushes.Load()
		must(t, f.Sync())
		if b.flushes.Load() == before {
			t.Error("fsync did not reach Flush")
		}
	}
	must(t, f.Close())
}

var (
	errFull   = errors.New("no space in the pool")
	errBroken = errors.New("broken")
)

// TestErrors: a backend's error reaches the user of the device, and only while it lasts.
func TestErrors(t *testing.T) {
	b := newBackend(t, 4<<20)
	d := attach(t, b, Options{Errno: func(err error) uintptr {
		if errors.Is(err, errFull) {
			return uintptr(unix.ENOSPC)
		}
		return 0
	}})
	f := directIO(t, d.Path())
	buf := aligned(64 << 10)
	operations := []struct {
		name, op string
		do       func() error
	}{
		{"read", "read", func() error { _, err := f.ReadAt(buf, 4096); return err }},
		{"write", "write", func() error { _, err := f.WriteAt(buf, 4096); return err }},
		{"fsync", "flush", f.Sync},
		{"discard", "discard", func() error { return blockRange(f, unix.BLKDISCARD, 1<<20) }},
		{"zero", "zero", func() error { return blockRange(f, unix.BLKZEROOUT, 1<<20) }},
	}
	for _, o := range operations {
		for _, c := range []struct{ fail, want error }{{errBroken, unix.EIO}, {errFull, unix.ENOSPC}} {
			want := c.want
			if o.op != "read" && o.op != "write" {
				want = unix.EIO // all that loop lets through
			}
			b.failWith(func(op string) error {
				if op != o.op {
					return nil
				}
				return fmt.Errorf("injected: %w", c.fail)
			})
			wantErr(t, o.name, o.do(), want)
			b.heal()
			if err := o.do(); err != nil {
				t.Errorf("%s after the error: %v", o.name, err)
			}
		}
	}
	must(t, f.Close())
	if got := sysfs(t, d.Path(), "queue/discard_max_bytes"); got == "0" {
		t.Error("an error has switched discard off")
	}
}

// TestTreacherousErrors: numbers that would switch a feature off, or leave the request without an end.
func TestTreacherousErrors(t *testing.T) {
	b := newBackend(t, 4<<20)
	var errno unix.Errno
	d := attach(t, b, Options{Errno: func(error) uintptr { return uintptr(errno) }})
	f := directIO(t, d.Path())
	for _, errno = range []unix.Errno{unix.ENOSYS, unix.EOPNOTSUPP, unix.EAGAIN, unix.EINTR, 512, 513, 4095, 1 << 20, unix.EINVAL} {
		b.failWith(func(string) error { return errBroken })
		_, err := f.WriteAt(aligned(4096), 0)
		if err == nil {
			t.Errorf("%d: write succeeded", errno)
		}
		wantErr(t, fmt.Sprintf("%d: fsync", errno), f.Sync(), unix.EIO)
		if err := blockRange(f, unix.BLKDISCARD, 0); err == nil {
			t.Errorf("%d: discard succeeded", errno)
		}
		b.heal()
		before := b.flushes.Load()
		must(t, f.Sync())
		must(t, blockRange(f, unix.BLKDISCARD, 0))
		must(t, blockRange(f, unix.BLKZEROOUT, 0))
		discarded, zeroed := b.spans()
		if b.flushes.Load() == before || len(discarded) == 0 || len(zeroed) == 0 {
			t.Fatalf("%d has switched a feature off", errno)
		}
	}
	must(t, f.Close())
}

// TestShort: a backend that does less than it was asked for, without an error, is an error.
func TestShort(t *testing.T) {
	b := newBackend(t, 1<<20)
	d := attach(t, b, Options{})
	f := directIO(t, d.Path())
	b.short.Store(512)
	buf := aligned(8192)
	_, err := f.ReadAt(buf, 0)
	wantErr(t, "read", err, unix.EIO)
	_, err = f.WriteAt(buf, 0)
	wantErr(t, "write", err, unix.EIO)
	b.heal()
	// The backend ends before the device does.
	must(t, b.file.Truncate(512<<10))
	_, err = f.ReadAt(buf, 512<<10-4096)
	wantErr(t, "read beyond the end", err, unix.EIO)
	must(t, f.Close())
}

// blockRange carries out BLKDISCARD or BLKZEROOUT on 1 MiB.
func blockRange(f *os.File, request uint, off uint64) error {
	r := [2]uint64{off, 1 << 20}
	return ioctlPointer(f, request, &r)
}

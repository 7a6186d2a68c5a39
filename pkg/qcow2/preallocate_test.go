package qcow2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
)

// mapExtent is a row of `qemu-img map --output=json`, as far as it does not depend on the file system's holes.
type mapExtent struct {
	Start, Length int64
	Data, Present bool
}

// qemuMap returns what QEMU says about an image, joined.
func qemuMap(t *testing.T, path string) []mapExtent {
	t.Helper()
	var all, joined []mapExtent
	must(t, json.Unmarshal([]byte(qemuImg(t, "map", "-f", "qcow2", "--output=json", path)), &all))
	for _, e := range all {
		if k := len(joined) - 1; k >= 0 && joined[k].Data == e.Data && joined[k].Present == e.Present {
			joined[k].Length += e.Length
			continue
		}
		joined = append(joined, e)
	}
	return joined
}

func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

// TestPreallocation compares our images with those that qemu-img creates: mapping, length, blocks, and that a check is
// clean. A guest's write finds its clusters there.
func TestPreallocation(t *testing.T) {
	const size = 1<<20 + 512
	for _, options := range []CreateOptions{
		{},
		{ClusterSize: 512},
		{ClusterSize: 4 << 10, Version: 2},
		{ClusterSize: 2 << 20},
		{ClusterSize: 16 << 10, ExtendedL2: true},
		{ClusterSize: 4 << 10, RefcountBits: 1},
		{ClusterSize: 4 << 10, RefcountBits: 64},
	} {
		for kind, name := range preallocationNames() {
			o := options
			o.Preallocation = Preallocation(kind)
			t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
				t.Parallel()
				ours, theirs := tempImage(t), tempImage(t)
				createFile(t, ours, size, o)
				_, err := o.geometry()
				must(t, err)
				k := duetKind{cluster: o.ClusterSize, version: o.Version, refcountBits: o.RefcountBits, extended: o.ExtendedL2, preallocation: name}
				qemuImg(t, "create", "-q", "-f", "qcow2", "-o", k.options(), theirs, fmt.Sprint(size))
				if c := runQemuCheck(t, ours); c.exit != 0 {
					t.Fatalf("qemu-img check: %s", c.output)
				}
				// QEMU gives subclusters a host cluster and leaves them unallocated; ours need no new mapping later.
				if a, b := qemuMap(t, ours), qemuMap(t, theirs); !slices.Equal(a, b) && !o.ExtendedL2 {
					t.Errorf("ours is mapped %+v,\nQEMU's %+v", a, b)
				}
				// QEMU scatters its tables over the holes of a sparse file.
				a, b := blocksOf(t, ours), blocksOf(t, theirs)
				if slack := 8*o.ClusterSize + 64<<10; a > b+slack || a < b-slack && o.Preallocation != PreallocationMetadata {
					t.Errorf("ours occupies %d bytes, QEMU's %d", a, b)
				}
				if o.Preallocation == PreallocationOff {
					return
				}
				f, err := OpenFile(ours, false)
				must(t, err)
				before, err := f.Size()
				must(t, err)
				img, err := Open(f, OpenOptions{})
				must(t, err)
				p := stamp(1, 0, size)
				_, err = img.WriteAt(p, 0)
				must(t, err)
				must(t, img.Close())
				if after, err := os.Stat(ours); err != nil || after.Size() != before {
					t.Errorf("a guest's write made the file %d bytes large, it had %d, %v", after.Size(), before, err)
				}
				want := newSparse()
				want.writeAt(p, 0)
				qemuReads(t, ours, "", want, size)
			})
		}
	}
}

func createFile(t *testing.T, path string, size int64, o CreateOptions) {
	t.Helper()
	f, err := CreateFile(path)
	must(t, err)
	must(t, Create(t.Context(), f, size, o))
	must(t, f.Close())
}

// TestPreallocationFails: a full disk, or an end from outside, leaves an empty file.
func TestPreallocationFails(t *testing.T) {
	dir := testfs.Tmpfs(t, "4m")
	for kind := PreallocationFalloc; kind <= PreallocationFull; kind++ {
		f, err := CreateFile(filepath.Join(dir, kind.String()))
		must(t, err)
		if err := Create(t.Context(), f, 16<<20, CreateOptions{Preallocation: kind}); !errors.Is(err, ErrNoSpace) {
			t.Errorf("%s on a full disk: %v", kind, err)
		}
		if n, err := f.Size(); err != nil || n != 0 {
			t.Errorf("%s leaves %d bytes, %v", kind, n, err)
		}
		stopped, stop := context.WithCancel(t.Context())
		stop()
		err = Create(stopped, f, 1<<20, CreateOptions{Preallocation: kind})
		if n, _ := f.Size(); !errors.Is(err, context.Canceled) || n != 0 {
			t.Errorf("%s stopped: %v, %d bytes left", kind, err, n)
		}
		must(t, f.Close())
	}
	t.Run("faults", func(t *testing.T) {
		o := CreateOptions{ClusterSize: 512, Preallocation: PreallocationFull}
		for n := 0; ; n++ {
			f := newMemFile("preallocated")
			happened := f.failOnce(n, func(k callKind) bool { return k != callTruncate }, syscall.EIO)
			err := Create(t.Context(), f, 64<<10, o)
			if !happened() {
				must(t, err)
				break
			}
			if !errors.Is(err, syscall.EIO) || f.content.size != 0 {
				t.Errorf("call %d failed: %v, %d bytes left", n, err, f.content.size)
			}
		}
	})
	if _, err := ParsePreallocation("some"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an unknown kind: %v", err)
	}
}

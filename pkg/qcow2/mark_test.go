package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// This file shows that an image is changed only where its counts are vouched for: what others have written is verified first.

// zeroCounts is what writers leave who do not count: the first refcount block is zeros, and nothing says so.
func zeroCounts(t *testing.T, path string) {
	t.Helper()
	f := loadMemFile(t, path)
	h, err := format.ReadHeader(f, format.ParseHeader)
	must(t, err)
	out, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = out.WriteAt(make([]byte, 1<<h.ClusterBits), refBlockAt(f))
	must(t, errors.Join(err, out.Close()))
}

// openAt opens an image as offline commands do, or as it is served to guests.
func openAt(path string, served bool) (*Image, error) {
	open := func() (File, error) { return OpenFile(path, false) }
	if served {
		open = func() (File, error) { return OpenDirectFile(path) }
	}
	f, err := open()
	if err != nil {
		return nil, err
	}
	return Open(f, OpenOptions{})
}

// TestUncounted opens images whose counts are all 0, written by QEMU and by us: they are refused for writing, with the way
// out, and not one byte is lost; read, they are what they were.
func TestUncounted(t *testing.T) {
	for _, who := range []string{"QEMU", "us"} {
		for _, served := range []bool{false, true} {
			t.Run(fmt.Sprint(who, ", served ", served), func(t *testing.T) {
				path := tempImage(t)
				if who == "QEMU" {
					qemuImg(t, "create", "-q", "-f", "qcow2", path, "64M")
					qemuIO(t, path, "write -q -P 1 0 8M")
				} else {
					f, err := CreateFile(path)
					must(t, err)
					must(t, Create(t.Context(), f, 64<<20, CreateOptions{}))
					img, err := Open(f, OpenOptions{})
					must(t, err)
					_, err = img.WriteAt(bytes.Repeat([]byte{1}, 8<<20), 0)
					must(t, errors.Join(err, img.Close()))
				}
				zeroCounts(t, path)
				before, err := os.ReadFile(path)
				must(t, err)
				_, err = openAt(path, served)
				if !errors.Is(err, ErrCorrupt) || !errors.Is(err, ErrNeedsRepair) {
					t.Errorf("opened for writing: %v", err)
				}
				if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
					t.Errorf("the file of %d bytes has %d, or others: %v", len(before), len(after), err)
				}
				f, err := OpenFile(path, true)
				must(t, err)
				img, err := Open(f, OpenOptions{ReadOnly: true})
				must(t, err)
				p := make([]byte, 8<<20)
				_, err = img.ReadAt(p, 0)
				if must(t, err); !bytes.Equal(p, bytes.Repeat([]byte{1}, len(p))) {
					t.Error("it reads otherwise")
				}
				must(t, img.Close())
				f, err = OpenFile(path, false)
				must(t, err)
				r, err := Repair(t.Context(), f, RepairAll, nil)
				if must(t, errors.Join(err, f.Close())); r.Left.ExitStatus() != 0 || r.Lost != 0 {
					t.Errorf("repaired: %+v", r)
				}
				img, err = openAt(path, served)
				must(t, err)
				must(t, img.Close())
				qemuIO(t, path, "read -q -P 1 0 8M")
			})
		}
	}
}

// countsReads counts what an opening reads, to tell whether it verifies.
type countsReads struct {
	File
	host.Marker
	bytes int64
}

func (c *countsReads) ReadAt(p []byte, off int64) (int, error) {
	c.bytes += int64(len(p))
	return c.File.ReadAt(p, off)
}

// verifies tells whether the image at path is verified when it is opened for writing. It changes nothing.
func verifies(t *testing.T, path string) bool {
	t.Helper()
	f, err := OpenFile(path, false)
	must(t, err)
	c := &countsReads{File: f, Marker: f.(host.Marker)}
	img, err := Open(c, OpenOptions{})
	must(t, err)
	l2 := int64(0)
	for _, e := range img.l1 {
		if e.Offset() != 0 {
			l2 += img.g.ClusterSize
		}
	}
	if l2 < 8*img.g.ClusterSize {
		t.Fatal("too few L2 tables to tell")
	}
	must(t, img.Close())
	return c.bytes > l2
}

// TestMark follows the mark through the life of an image: whatever we have made ourselves is not verified again, and whatever
// others may have written is, once.
func TestMark(t *testing.T) {
	path := tempImage(t)
	f, err := CreateFile(path)
	must(t, err)
	must(t, Create(t.Context(), f, 16<<20, CreateOptions{ClusterSize: 4096}))
	use := func(f File) {
		t.Helper()
		img, err := Open(f, OpenOptions{})
		must(t, err)
		for off := int64(0); off < img.Size(); off += img.g.L2Coverage {
			_, err = img.WriteAt(stamp(1, off, 4096), off)
			must(t, err)
		}
		must(t, img.Close())
	}
	open := func() File {
		f, err := OpenFile(path, false)
		must(t, err)
		return f
	}
	expect := func(what string, want bool) {
		t.Helper()
		if got := verifies(t, path); got != want {
			t.Errorf("%s: verified %t, want %t", what, got, want)
		}
	}
	use(f)
	expect("created by us", false)
	must(t, exec.CommandContext(t.Context(), "touch", path).Run())
	expect("written by somebody", true)
	expect("and only read since", true)
	use(open())
	expect("verified and written", false)
	qemuIO(t, path, "write -P 3 0 4096")
	expect("written by QEMU", true)
	use(open())

	other := filepath.Join(t.TempDir(), "copy")
	must(t, exec.CommandContext(t.Context(), "cp", "-a", path, other).Run())
	if !verifies(t, other) {
		t.Error("a copy with all attributes and times is not verified")
	}
	r, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = r.WriteAt([]byte{0, 1}, 3*4096) // at once after the close: what is there is not asked
	must(t, errors.Join(err, r.Close()))
	if f := open(); host.Vouched(f) {
		t.Error("a write right after the close is not noticed")
	} else {
		must(t, f.Close())
	}
}

// TestMarkOfTheDead: what a process leaves that had no time to close the image is verified, unless the next one has its redo log,
// or the machine was started again and nobody has written since.
func TestMarkOfTheDead(t *testing.T) {
	words := make([]uint64, MinRedoLog)
	for _, test := range []struct {
		name  string
		after func(f *memFile)
		redo  bool
		vouch bool
	}{
		{name: "a dead process", after: func(*memFile) {}},
		{name: "another takes over", after: func(*memFile) {}, redo: true, vouch: true},
		{name: "a power cut", after: func(f *memFile) { f.boot = "the next boot" }, vouch: true},
		{name: "a power cut, and another writer", after: func(f *memFile) {
			f.boot = "the next boot"
			f.written += int64(host.MarkLease + time.Second)
		}},
		{name: "a power cut, and another writer whose clock is wrong", after: func(f *memFile) {
			f.boot = "the next boot"
			f.written = 1
		}},
		{name: "a machine that does not tell its boots apart", after: func(f *memFile) { f.boot = "" }},
	} {
		t.Run(test.name, func(t *testing.T) {
			clear(words)
			l, err := NewRedoLog(words)
			must(t, err)
			f := newMemFile("dead")
			must(t, Create(t.Context(), f, 1<<20, CreateOptions{ClusterSize: 4096}))
			img, err := Open(f, OpenOptions{Redo: l})
			must(t, err)
			_, err = img.WriteAt(stamp(1, 0, 8192), 0)
			must(t, errors.Join(err, img.Flush()))
			f = f.clone() // it dies
			must(t, img.Close())
			f.content.zero(refBlockAt(f), 4096) // to tell whether anybody looks
			test.after(f)
			o := OpenOptions{}
			if test.redo {
				o.Redo = l
			}
			_, err = Open(f, o)
			if (err == nil) != test.vouch || err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("vouched for %t, and opening it: %v", test.vouch, err)
			}
		})
	}
}

// TestLease: the mark of an image that is written to for long is renewed, also when all writes are direct.
func TestLease(t *testing.T) {
	f := newMemFile("leased")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{ClusterSize: 4096}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(stamp(1, 0, 8192), 0)
	must(t, err)
	f.mark = nil
	_, err = img.WriteAt(stamp(2, 0, 4096), 0)
	must(t, err)
	if f.mark != nil {
		t.Fatal("each write renews it")
	}
	img.f.EndLease() // time passes
	var d Direct
	if _, ok := img.StartDirect(&d, 0, 4096, true); ok {
		t.Fatal("a direct write begins although the lease has ended")
	}
	if _, ok := img.StartDirect(&d, 0, 4096, false); !ok {
		t.Fatal("a direct read does not")
	}
	img.EndDirect(&d, false)
	_, err = img.WriteAt(stamp(3, 0, 4096), 0)
	must(t, err)
	if f.mark == nil {
		t.Error("it is not renewed")
	}
	if _, ok := img.StartDirect(&d, 0, 4096, true); !ok {
		t.Fatal("no direct write begins although it was renewed")
	}
	img.EndDirect(&d, true)
	must(t, img.Close())
}

// TestUnchanged: who opens an image for writing and changes nothing leaves the file as it was, time and mark included.
func TestUnchanged(t *testing.T) {
	for _, name := range []string{"bitmaps", "ours"} {
		f := hostileImage(t, 3)
		if name == "bitmaps" {
			put64(f, 88, 1<<33)
		}
		before := f.clone()
		img, err := Open(f, OpenOptions{})
		must(t, err)
		if err := img.DeleteSnapshot(t.Context(), ByName("none")); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
		_, err = img.ReadAt(make([]byte, hostileDisk), 0)
		must(t, errors.Join(err, img.Flush(), img.Close()))
		if !sameContent(f, before) || f.written != before.written || !bytes.Equal(f.mark, before.mark) {
			t.Errorf("%s: the file was changed", name)
		}
	}
}

// TestCopiedOfAmend: QEMU's downgrade to version 2 leaves COPIED on clusters that a snapshot shares, and its own next write
// changes the snapshot. Ours does not.
func TestCopiedOfAmend(t *testing.T) {
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "4M")
	qemuIO(t, path, "write -q -P 1 0 1M")
	qemuImg(t, "snapshot", "-c", "shared", path)
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -q -z 0 1M", path) // it keeps the clusters
	qemuImg(t, "amend", "-f", "qcow2", "-o", "compat=0.10", path)
	f := loadMemFile(t, path)
	if r, err := checkFile(t.Context(), f.clone()); err != nil || r.Corruptions == 0 {
		t.Fatalf("QEMU has left no such flags: %+v, %v", r, err)
	}
	before := readable(t, f)["snapshot 1"]
	img, err := openAt(path, false)
	must(t, err)
	_, err = img.WriteAt(bytes.Repeat([]byte{7}, 1<<20), 0)
	must(t, errors.Join(err, img.Close()))
	if r := runQemuCheck(t, path); r.exit != 0 {
		t.Errorf("qemu-img check: %s", r.output)
	}
	qemuIO(t, path, "read -q -P 7 0 1M")
	if diff := (content{"snapshot 1": before}).changed(t, loadMemFile(t, path)); diff != "" {
		t.Error(diff)
	}
}

// TestCutShort: what was cut off the end of the file is not zeros. An image that nobody vouches for is refused, and of one that
// is open such clusters cannot be read.
func TestCutShort(t *testing.T) {
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "4M")
	qemuIO(t, path, "write -q -P 1 0 1M")
	f := loadMemFile(t, path)
	f.content.truncate(f.content.size - 256<<10)
	if _, err := Open(f.clone(), OpenOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("opened for writing: %v", err)
	}
	for _, readOnly := range []bool{false, true} {
		f := f.clone().disguise()
		img, err := Open(f, OpenOptions{ReadOnly: readOnly})
		must(t, err)
		p := make([]byte, 512<<10)
		if _, err = img.ReadAt(p, 0); err != nil {
			t.Errorf("read what is there: %v", err)
		}
		if _, err = img.ReadAt(p, 512<<10); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "cut short") {
			t.Errorf("read what was cut off: %v", err)
		}
		if err := Clone(t.Context(), newMemFile("clone"), img.Active(), 0, nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("clone: %v", err)
		}
		_ = img.Close()
	}
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file has a test for each hazard that others have met (docs of QEMU, its CVEs, the issues of other
// implementations) and that hostile_test.go does not refuse at the opening already. Each bears its name.

// openHazard opens an image that can be opened.
func openHazard(t *testing.T, f *memFile) *Image {
	t.Helper()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	return img
}

// refuses demands that an operation on a hostile image fails so, with bounded work.
func refuses(t *testing.T, f *memFile, want error, do func(*Image) error) {
	t.Helper()
	calls, memory := fuzzLimits(f)
	w := watch(f.disguise(), 32<<20, 8*calls)
	within(t, 4*memory, func() {
		img, err := Open(w, OpenOptions{})
		if err == nil {
			err = do(img)
			_ = img.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	})
	if v := w.violated.Load(); v != nil {
		t.Error(*v)
	}
}

func TestHazards(t *testing.T) {
	snapshot := ByName("snapshot")
	gotoIt := func(img *Image) error { return img.GotoSnapshot(t.Context(), snapshot) }
	viewIt := func(img *Image) error {
		v, err := img.OpenSnapshot(snapshot)
		if err != nil {
			return err
		}
		_, err = v.ReadAt(make([]byte, 512), 0)
		return err
	}
	deleteIt := func(img *Image) error { return img.DeleteSnapshot(t.Context(), snapshot) }
	createOne := func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "another", nil); return err }
	writeIt := func(img *Image) error { _, err := img.WriteAt(make([]byte, 512), 0); return err }
	copied := func(off int64) uint64 { return format.FlagCopied | uint64(off) }
	const hugeDisk = 1 << 61

	for _, hazard := range []struct {
		name string
		make func(f *memFile)
		want error
		do   func(*Image) error
	}{
		{"CVE-2014-0145: a snapshot's disk that needs a huge L1, goto", func(f *memFile) { put64(f, snapshotTableAt(f)+48, hugeDisk) }, ErrLimit, gotoIt},
		{"CVE-2014-0143: a snapshot's disk that needs a huge L1, view", func(f *memFile) { put64(f, snapshotTableAt(f)+48, hugeDisk) }, ErrLimit, viewIt},
		{"a snapshot's disk whose L1 overflows", func(f *memFile) { put64(f, snapshotTableAt(f)+48, 1<<63-1) }, ErrLimit, viewIt},
		{"a snapshot's L1 in the header", func(f *memFile) { put64(f, snapshotTableAt(f), 0) }, ErrCorrupt, gotoIt},
		{"a snapshot's L1 on the active L1", func(f *memFile) { put64(f, snapshotTableAt(f), uint64(l1At(f))) }, ErrCorrupt, createOne},
		{"a snapshot's L1 on the refcount table", func(f *memFile) { put64(f, snapshotTableAt(f), uint64(refTableAt(f))) }, ErrCorrupt, createOne},
		{"a refcount block on the active L1", func(f *memFile) { put64(f, refTableAt(f), uint64(l1At(f))) }, ErrCorrupt, writeIt},
		{"two refcount table entries for one block", func(f *memFile) { put64(f, refTableAt(f)+8, uint64(refBlockAt(f))) }, ErrCorrupt, writeIt},
		{"the active L1 on the snapshot table", func(f *memFile) { put64(f, 40, uint64(snapshotTableAt(f))) }, ErrCorrupt, writeIt},
		{"an L2 table in the active L1 (a loop)", func(f *memFile) { put64(f, l1At(f), copied(l1At(f))) }, ErrCorrupt, writeIt},
		{"an L2 table in the refcount table", func(f *memFile) { put64(f, l1At(f), copied(refTableAt(f))) }, ErrCorrupt, writeIt},
		{"an L2 table in a refcount block", func(f *memFile) { put64(f, l1At(f), copied(refBlockAt(f))) }, ErrCorrupt, writeIt},
		{"an L2 table in the snapshot table", func(f *memFile) { put64(f, l1At(f), copied(snapshotTableAt(f))) }, ErrCorrupt, writeIt},
		{"an L2 table in a snapshot's L1", func(f *memFile) { put64(f, l1At(f), copied(snapshotL1At(f))) }, ErrCorrupt, writeIt},
		{"a COPIED L2 table that a snapshot has", func(f *memFile) { put64(f, l1At(f), copied(snapshotL2At(f))) }, ErrCorrupt, writeIt},
		{"a COPIED L2 table that the active L1 has twice", func(f *memFile) { put64(f, l1At(f)+8, get64(f, l1At(f))) }, ErrCorrupt, writeIt},
		{"a snapshot's L2 table in the refcount table", func(f *memFile) { put64(f, snapshotL1At(f), uint64(refTableAt(f))) }, ErrCorrupt, deleteIt},
		{"data in the header", func(f *memFile) { put64(f, l2At(f), format.FlagCopied|format.FlagZero) }, nil, writeIt},
		{"data in the active L1", func(f *memFile) { put64(f, l2At(f), copied(l1At(f))) }, ErrCorrupt, writeIt},
		{"data in the active L2 itself", func(f *memFile) { put64(f, l2At(f), copied(l2At(f))) }, ErrCorrupt, writeIt},
		{"data in the refcount table", func(f *memFile) { put64(f, l2At(f), copied(refTableAt(f))) }, ErrCorrupt, writeIt},
		{"data in a refcount block", func(f *memFile) { put64(f, l2At(f), copied(refBlockAt(f))) }, ErrCorrupt, writeIt},
		{"data in the snapshot table", func(f *memFile) { put64(f, l2At(f), copied(snapshotTableAt(f))) }, ErrCorrupt, writeIt},
		{"data in a snapshot's L1", func(f *memFile) { put64(f, l2At(f), copied(snapshotL1At(f))) }, ErrCorrupt, writeIt},
		{"data in a snapshot's L2", func(f *memFile) { put64(f, l2At(f), copied(snapshotL2At(f))) }, ErrCorrupt, writeIt},
		{"discarded data in a snapshot's L2", func(f *memFile) { put64(f, l2At(f), uint64(snapshotL2At(f))) }, ErrCorrupt, func(img *Image) error { return img.Discard(0, 512) }},
		{"an L1 entry that is not aligned", func(f *memFile) { put64(f, l1At(f), copied(l2At(f)+8)) }, ErrCorrupt, writeIt},
		{"an L1 entry behind the end", func(f *memFile) { put64(f, l1At(f), copied(1<<40)) }, ErrCorrupt, writeIt},
		{"an L2 entry behind the end, snapshot", func(f *memFile) { put64(f, l2At(f), copied(1<<40)) }, ErrCorrupt, createOne},
		{"a compressed cluster behind the end, snapshot", func(f *memFile) { put64(f, l2At(f), format.FlagCompressed|1<<40) }, ErrCorrupt, createOne},
		{"a compressed bomb (garbage)", func(f *memFile) { put64(f, l2At(f), format.FlagCompressed|uint64(l1At(f))) }, ErrCorrupt, writeIt},
		{"a reference count that overflows", func(f *memFile) { f.content.writeAt(bytes.Repeat([]byte{0xff}, 256), refBlockAt(f)) }, ErrLimit, createOne},
		{"a reference count that falls below 0", func(f *memFile) { put64(f, refBlockAt(f)+16, 0); put64(f, refBlockAt(f)+24, 0) }, ErrCorrupt, deleteIt},
		{"all of the file and more is counted: the file would grow 80 times", func(f *memFile) {
			f.content.writeAt(bytes.Repeat([]byte{0, 1}, 256), refBlockAt(f))
			for i := int64(1); i < 64; i++ { // as many blocks, all full
				at := f.content.size
				f.content.writeAt(bytes.Repeat([]byte{0, 1}, 256), at)
				put64(f, refTableAt(f)+8*i, uint64(at))
			}
		}, nil, writeIt},
	} {
		t.Run(hazard.name, func(t *testing.T) {
			f := hostileImage(t, 3)
			hazard.make(f)
			refuses(t, f, hazard.want, hazard.do)
		})
	}
}

// TestHazardSharedTables: an L1 table whose entries all point at one L2 table must not make an operation longer than the
// file is (KubeVirt #1318).
func TestHazardSharedTables(t *testing.T) {
	f := newMemFile("shared")
	const entries = 1 << 16
	must(t, Create(t.Context(), f, entries*64*512, CreateOptions{ClusterSize: 512}))
	l2 := f.content.size
	f.content.truncate(l2 + 512)
	f.content.writeAt(bytes.Repeat(binary.BigEndian.AppendUint64(nil, uint64(l2)), entries), l1At(f))
	refuses(t, f, ErrCorrupt, func(*Image) error { return nil })
}

// TestHazardHugeEmptyDisk: an exbibyte that nothing maps costs no time to list, to clone or to discard.
func TestHazardHugeEmptyDisk(t *testing.T) {
	f := newMemFile("huge")
	const disk = 1 << 60
	must(t, Create(t.Context(), f, disk, CreateOptions{ClusterSize: 2 << 20}))
	img := openHazard(t, f)
	n := 0
	must(t, img.Active().Extents(0, func(Extent) error { n++; return nil }))
	if n != 1 {
		t.Errorf("%d extents, want one", n)
	}
	must(t, img.Discard(0, disk))
	must(t, Clone(t.Context(), newMemFile("clone"), img.Active(), 0, nil))
	must(t, img.Close())
}

// TestHazardProbing: a qcow2 header that a guest writes to its disk is data (CVE-2026-24708, CVE-2026-27211).
func TestHazardProbing(t *testing.T) {
	inner := hostileImage(t, 3)
	put64(inner, 8, 200)
	put32(inner, 16, 11)
	inner.content.writeAt([]byte("/etc/shadow"), 200)
	b := make([]byte, 8192)
	inner.content.readAt(b, 0)
	f := newMemFile("outer")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	img := openHazard(t, f)
	_, err := img.WriteAt(b, 0)
	must(t, err)
	must(t, img.Close())
	img = openHazard(t, f.reopen())
	got := make([]byte, len(b))
	_, err = img.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, b) || img.Size() != 1<<20 {
		t.Error("what the guest wrote is not what it reads")
	}
	must(t, img.Close())
}

// TestHazardHeaderRewrite: what we do not know survives each rewrite of the header: the compression byte (cloud-hypervisor
// 5b99f9ce4), the rest of a longer header, unknown compatible bits and extensions. Autoclear bits go before the first
// write of anything else.
func TestHazardHeaderRewrite(t *testing.T) {
	f := hostileImage(t, 3)
	put32(f, 100, 120)
	put64(f, 72, format.IncompatCompression)
	put64(f, 80, 1<<40|format.CompatLazyRefcounts)
	put64(f, 88, 1<<33)
	f.content.writeAt([]byte{format.CompressionZstd, 0, 0, 0, 0, 0, 0, 0, 't', 'a', 'i', 'l', 0, 0, 0, 0}, 104)
	put32(f, 120, 0x12345678)
	put32(f, 124, 5)
	f.content.writeAt([]byte("known"), 128)
	var before, after [format.SectorSize]byte
	f.content.readAt(before[:], 0)
	log := f.record()
	img := openHazard(t, f)
	_, err := img.WriteAt(make([]byte, 4096), 512)
	must(t, err)
	_, err = img.CreateSnapshot(t.Context(), "another", nil)
	must(t, err)
	must(t, img.GotoSnapshot(t.Context(), ByName("snapshot")))
	must(t, img.Resize(t.Context(), 2*hostileDisk))
	must(t, img.Close())

	f.content.readAt(after[:], 0)
	if !bytes.Equal(before[72:88], after[72:88]) || !bytes.Equal(before[96:], after[96:]) {
		t.Errorf("the header was\n%x\nand is\n%x", before[72:], after[72:])
	}
	calls := log.calls[1:] // behind the sync of the opening
	if first := calls[0]; first.kind != callWrite || first.off != 0 || binary.BigEndian.Uint64(first.data[88:]) != 0 || calls[1].kind != callSync {
		t.Errorf("the first calls are %v and %v, want the header with its autoclear bits cleared, and a sync", first, calls[1])
	}
}

// TestHazardDirtyBit: neither bit is dropped by somebody who only reads, or is refused (cloud-hypervisor 53ee9ebb7).
func TestHazardDirtyBit(t *testing.T) {
	for _, bit := range []uint64{format.IncompatDirty, format.IncompatCorrupt} {
		f := hostileImage(t, 3)
		put64(f, 72, bit)
		img, err := Open(f, OpenOptions{ReadOnly: true})
		must(t, err)
		must(t, img.Close())
		if got := get64(f, 72); got != bit {
			t.Errorf("bit %#x became %#x", bit, got)
		}
	}
}

// TestHazardOldTable: what is given up is not punched before the entry that gives it up is synced (cloud-hypervisor
// a5e145bde).
func TestHazardOldTable(t *testing.T) {
	f := hostileImage(t, 3)
	l2 := l2At(f)
	data := int64(get64(f, l2) & format.OffsetMask)
	img := openHazard(t, f)
	log := f.record()
	must(t, img.Discard(0, 512))
	must(t, img.Flush())
	must(t, img.Close())
	covers := func(c fileCall, off int64) bool { return c.off <= off && off < c.off+c.n }
	punch := slices.IndexFunc(log.calls, func(c fileCall) bool { return c.kind == callPunch && covers(c, data) })
	entry := slices.IndexFunc(log.calls, func(c fileCall) bool { return c.kind == callWrite && covers(c, l2) })
	if punch < 0 || entry < 0 {
		t.Fatalf("no punch at %#x or no write at %#x in %v", data, l2, log.calls)
	}
	if !slices.ContainsFunc(log.calls[min(entry, punch):punch], func(c fileCall) bool { return c.kind == callSync }) {
		t.Errorf("the entry is written by call %d, its cluster punched by call %d, and no sync is between", entry, punch)
	}
}

// TestHazardStalePunch: guests write to what others give up just now; no punch may reach what was handed out again
// (cloud-hypervisor 64c1bb3bf). One image has many queues and one owner (#7660).
func TestHazardStalePunch(t *testing.T) {
	f := newMemFile("punch")
	const queues, share = 4, 64 << 10
	must(t, Create(t.Context(), f, queues*share, CreateOptions{ClusterSize: 512}))
	img := openHazard(t, f)
	var all sync.WaitGroup
	for q := range int64(queues) {
		all.Go(func() {
			for i := range 30 {
				off := q*share + int64(i%7)*4096
				p := stamp(i, off, 4096)
				if _, err := img.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				if err := img.Discard(q*share+int64((i+3)%7)*4096, 4096); err != nil {
					t.Error(err)
				}
				if err := img.Flush(); err != nil {
					t.Error(err)
				}
				got := make([]byte, 4096)
				if _, err := img.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
					t.Errorf("queue %d, round %d: what was written is gone: %v", q, i, err)
				}
			}
		})
	}
	all.Wait()
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestHazardDiscardShowsOldData: a discard, or zeros, over shared, compressed or rewritten clusters reads as zeros, then and
// after a reopening (cloud-hypervisor 39e253ff9); growth shows nothing of what a disk was before it shrank.
func TestHazardDiscardShowsOldData(t *testing.T) {
	for _, version := range []int{2, 3} {
		f := hostileImage(t, version)
		img := openHazard(t, f)
		_, err := img.CreateSnapshot(t.Context(), "shared", nil)
		must(t, err)
		must(t, img.Discard(0, 2048))
		must(t, img.WriteZeroes(2048, 2000))
		must(t, img.Close())
		img = openHazard(t, f.reopen())
		got := make([]byte, 4048)
		_, err = img.ReadAt(got, 0)
		must(t, err)
		if !isZero(got) {
			t.Errorf("version %d: old data is there again", version)
		}
		must(t, img.Close())
	}
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	qemuIO(t, path, "write -P 1 0 1M")
	qemuImg(t, "resize", "-q", "-f", "qcow2", "--shrink", path, "100K")
	file, err := OpenFile(path, false)
	must(t, err)
	img, err := Open(file, OpenOptions{})
	must(t, err)
	must(t, img.Resize(t.Context(), 1<<20))
	p := make([]byte, 1<<20-100<<10)
	_, err = img.ReadAt(p, 100<<10)
	must(t, err)
	if bytes.ContainsFunc(p, func(r rune) bool { return r != 0 }) {
		t.Error("growth shows what the disk was before it shrank")
	}
	must(t, img.Close())
}

// TestHazardNarrowCounts: what does not fit a narrow refcount is refused, nothing has changed, and the error says what to do.
func TestHazardNarrowCounts(t *testing.T) {
	f := newMemFile("narrow")
	must(t, Create(t.Context(), f, 64<<10, CreateOptions{ClusterSize: 512, RefcountBits: 2}))
	img := openHazard(t, f)
	_, err := img.WriteAt(stamp(1, 0, 4096), 0)
	must(t, err)
	for i := range 2 {
		_, err = img.CreateSnapshot(t.Context(), fmt.Sprint("s", i), nil)
		must(t, err)
	}
	_, err = img.CreateSnapshot(t.Context(), "too many", nil)
	if !errors.Is(err, ErrLimit) || !strings.Contains(fmt.Sprint(err), "delete a snapshot") {
		t.Errorf("a fourth reference in two bits: %v", err)
	}
	must(t, img.DeleteSnapshot(t.Context(), ByName("s0")))
	_, err = img.CreateSnapshot(t.Context(), "now", nil)
	must(t, err)
	must(t, img.GotoSnapshot(t.Context(), ByName("now")))
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file opens and uses images whose metadata lies. Each lie is refused with the right error before anything is
// changed, however large the numbers are.

const hostileDisk = 64 << 10

// hostileImage returns a sound image of 512-byte clusters with a snapshot, data of its own and data that is shared.
func hostileImage(t testing.TB, version int) *memFile {
	t.Helper()
	f := newMemFile("hostile")
	must(t, Create(t.Context(), f, hostileDisk, CreateOptions{ClusterSize: 512, Version: version}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(stamp(1, 0, 8<<10), 0)
	must(t, err)
	_, err = img.CreateSnapshot(t.Context(), "snapshot", nil)
	must(t, err)
	_, err = img.WriteAt(stamp(2, 0, 4<<10), 0)
	must(t, err)
	must(t, img.Close())
	return f.reopen()
}

func get64(f *memFile, off int64) uint64 {
	var b [8]byte
	f.content.readAt(b[:], off)
	return binary.BigEndian.Uint64(b[:])
}

func put64(f *memFile, off int64, v uint64) {
	f.content.writeAt(binary.BigEndian.AppendUint64(nil, v), off)
}

func put32(f *memFile, off int64, v uint32) {
	f.content.writeAt(binary.BigEndian.AppendUint32(nil, v), off)
}

// places of hostileImage's metadata.
func l1At(f *memFile) int64            { return int64(get64(f, 40)) }
func l2At(f *memFile) int64            { return int64(get64(f, l1At(f)) & format.OffsetMask) }
func refTableAt(f *memFile) int64      { return int64(get64(f, 48)) }
func refBlockAt(f *memFile) int64      { return int64(get64(f, refTableAt(f))) }
func snapshotTableAt(f *memFile) int64 { return int64(get64(f, 64)) }
func snapshotL1At(f *memFile) int64    { return int64(get64(f, snapshotTableAt(f))) }
func snapshotL2At(f *memFile) int64    { return int64(get64(f, snapshotL1At(f)) & format.OffsetMask) }

func TestOpenRefuses(t *testing.T) {
	feature := func(f *memFile, bit uint) { put64(f, 72, get64(f, 72)|1<<bit) }
	for _, test := range []struct {
		name   string
		change func(f *memFile)
		want   error
		says   string
	}{
		{"no magic", func(f *memFile) { put32(f, 0, 0x7f454c46) }, ErrUnsupported, "magic"},
		{"an empty file", func(f *memFile) { f.content.truncate(0) }, ErrUnsupported, "magic"},
		{"a file of one sector", func(f *memFile) { f.content.truncate(512) }, ErrCorrupt, ""},
		{"version 1", func(f *memFile) { put32(f, 4, 1) }, ErrUnsupported, "version 1"},
		{"version 4", func(f *memFile) { put32(f, 4, 4) }, ErrUnsupported, "version 4"},
		{"a version that is negative", func(f *memFile) { put32(f, 4, 1<<31) }, ErrUnsupported, "version 2147483648"},
		{"cluster_bits 0", func(f *memFile) { put32(f, 20, 0) }, ErrUnsupported, "cluster_bits 0"},
		{"cluster_bits 8", func(f *memFile) { put32(f, 20, 8) }, ErrUnsupported, "cluster_bits 8"},
		{"cluster_bits 22", func(f *memFile) { put32(f, 20, 22) }, ErrUnsupported, "cluster_bits 22"},
		{"cluster_bits 64", func(f *memFile) { put32(f, 20, 64) }, ErrUnsupported, "cluster_bits 64"},
		{"cluster_bits that overflow", func(f *memFile) { put32(f, 20, math.MaxUint32) }, ErrUnsupported, "cluster_bits"},
		{"a backing file", func(f *memFile) { put64(f, 8, 300); put32(f, 16, 11); f.content.writeAt([]byte("/etc/shadow"), 300) }, ErrUnsupported, "backing file"},
		{"a backing file far away", func(f *memFile) { put64(f, 8, 1<<62); put32(f, 16, 11) }, ErrUnsupported, "backing file"},
		{"a backing file of huge name", func(f *memFile) { put64(f, 8, 104); put32(f, 16, math.MaxUint32) }, ErrUnsupported, "backing file"},
		{"AES", func(f *memFile) { put32(f, 32, 1) }, ErrUnsupported, "crypt_method 1"},
		{"LUKS", func(f *memFile) { put32(f, 32, 2) }, ErrUnsupported, "crypt_method 2"},
		{"the corrupt bit", func(f *memFile) { feature(f, 1) }, ErrCorrupt, "corrupt"},
		{"an external data file", func(f *memFile) { feature(f, 2) }, ErrUnsupported, "external file"},
		{"a compression type without its bit", func(f *memFile) { put32(f, 100, 112); f.content.writeAt([]byte{1}, 104) }, ErrCorrupt, "compression type 1"},
		{"a compression bit without a type", func(f *memFile) { feature(f, 3) }, ErrCorrupt, "compression type 0"},
		{"an unknown compression type", func(f *memFile) { feature(f, 3); put32(f, 100, 112); f.content.writeAt([]byte{2}, 104) }, ErrUnsupported, "compression type 2"},
		{"extended L2 with small clusters", func(f *memFile) { feature(f, 4) }, ErrCorrupt, "extended L2"},
		{"an unknown feature", func(f *memFile) { feature(f, 5) }, ErrUnsupported, "0x20"},
		{"a feature with a name", func(f *memFile) {
			feature(f, 63)
			put32(f, 104, format.ExtFeatureNames)
			put32(f, 108, 48)
			f.content.writeAt([]byte("\x00\x3fmind reading"), 112)
		}, ErrUnsupported, `"mind reading"`},
		{"refcount_order 7", func(f *memFile) { put32(f, 96, 7) }, ErrCorrupt, "refcount_order 7"},
		{"refcount_order that overflows", func(f *memFile) { put32(f, 96, math.MaxUint32) }, ErrCorrupt, "refcount_order"},
		{"a short header", func(f *memFile) { put32(f, 100, 96) }, ErrCorrupt, "header_length 96"},
		{"an odd header", func(f *memFile) { put32(f, 100, 105) }, ErrCorrupt, "header_length 105"},
		{"a long header", func(f *memFile) { put32(f, 100, 520) }, ErrCorrupt, "header_length 520"},
		{"an endless header", func(f *memFile) { put32(f, 100, 0xfffffff8) }, ErrCorrupt, "header_length"},
		{"an extension that leaves the cluster", func(f *memFile) { put32(f, 104, 0x12345678); put32(f, 108, 401) }, ErrCorrupt, "extension 0x12345678"},
		{"an extension that overflows", func(f *memFile) { put32(f, 104, format.ExtBitmaps); put32(f, 108, math.MaxUint32) }, ErrCorrupt, "extension"},
		{"a negative disk", func(f *memFile) { put64(f, 24, 1<<63) }, ErrLimit, "9223372036854775808"},
		{"a disk too large", func(f *memFile) { put64(f, 24, 1<<62) }, ErrLimit, "L1 table"},
		{"an L1 too large", func(f *memFile) { put32(f, 36, format.MaxL1Bytes/8+1) }, ErrLimit, "4194305 entries"},
		{"an L1 that overflows", func(f *memFile) { put32(f, 36, math.MaxUint32) }, ErrLimit, "4294967295 entries"},
		{"an L1 larger than the file", func(f *memFile) { put32(f, 36, format.MaxL1Bytes/8) }, ErrCorrupt, "end of the file"},
		{"an L1 too small", func(f *memFile) { put32(f, 36, 1) }, ErrCorrupt, "too small"},
		{"an L1 in the header", func(f *memFile) { put64(f, 40, 0) }, ErrCorrupt, "offset 0"},
		{"an unaligned L1", func(f *memFile) { put64(f, 40, get64(f, 40)+8) }, ErrCorrupt, "l1_table_offset"},
		{"an L1 behind the end", func(f *memFile) { put64(f, 40, 1<<40) }, ErrCorrupt, "end of the file"},
		{"an L1 at an offset that no file has", func(f *memFile) { put64(f, 40, 1<<63) }, ErrCorrupt, "l1_table_offset"},
		{"no refcount table", func(f *memFile) { put32(f, 56, 0) }, ErrCorrupt, "no refcount table"},
		{"a refcount table in the header", func(f *memFile) { put64(f, 48, 0) }, ErrCorrupt, "refcount table"},
		{"an unaligned refcount table", func(f *memFile) { put64(f, 48, get64(f, 48)+256) }, ErrCorrupt, "refcount_table_offset"},
		{"a refcount table behind the end", func(f *memFile) { put64(f, 48, 1<<40) }, ErrCorrupt, "refcount table"},
		{"a refcount block behind the end", func(f *memFile) { put64(f, refTableAt(f), 1<<40) }, ErrCorrupt, "refcount table entry 0"},
		{"a refcount table too large", func(f *memFile) { put32(f, 56, format.MaxRefcountTableBytes/512+1) }, ErrLimit, "16385 clusters"},
		{"a refcount table that overflows", func(f *memFile) { put32(f, 56, math.MaxUint32) }, ErrLimit, "refcount table"},
		{"a refcount table larger than the file", func(f *memFile) { put32(f, 56, format.MaxRefcountTableBytes/512) }, ErrCorrupt, ""},
		{"an unaligned refcount block", func(f *memFile) { put64(f, refTableAt(f), get64(f, refTableAt(f))+1) }, ErrCorrupt, "refcount table entry 0"},
		{"a refcount block at an offset that no file has", func(f *memFile) { put64(f, refTableAt(f), 1<<60) }, ErrCorrupt, "refcount table entry 0"},
		{"too many snapshots", func(f *memFile) { put32(f, 60, format.MaxSnapshots+1) }, ErrLimit, "65537 snapshots"},
		{"snapshots that overflow", func(f *memFile) { put32(f, 60, math.MaxUint32) }, ErrLimit, "snapshots"},
		{"more snapshots than the table holds", func(f *memFile) { put32(f, 60, format.MaxSnapshots) }, ErrLimit, "extra data"},
		{"a snapshot table in the header", func(f *memFile) { put64(f, 64, 0) }, ErrCorrupt, "snapshot table"},
		{"an unaligned snapshot table", func(f *memFile) { put64(f, 64, get64(f, 64)+8) }, ErrCorrupt, "snapshots_offset"},
		{"a snapshot table behind the end", func(f *memFile) { put64(f, 64, 1<<40) }, ErrCorrupt, "row 0"},
		{"a snapshot's L1 too large", func(f *memFile) { put32(f, snapshotTableAt(f)+8, math.MaxUint32) }, ErrLimit, "row 0"},
		{"a snapshot with too much extra data", func(f *memFile) { put32(f, snapshotTableAt(f)+36, 1025) }, ErrLimit, "1025 bytes of extra data"},
		{"a snapshot with extra data that overflows", func(f *memFile) { put32(f, snapshotTableAt(f)+36, math.MaxUint32) }, ErrLimit, "extra data"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := hostileImage(t, 3)
			test.change(f)
			before := f.clone()
			img, err := Open(f, OpenOptions{})
			if err == nil {
				img.Close()
			}
			if !errors.Is(err, test.want) || !strings.Contains(fmt.Sprint(err), test.says) {
				t.Fatalf("got %v, want %v and %q", err, test.want, test.says)
			}
			if !f.closed {
				t.Error("the file was left open")
			}
			if !sameContent(f, before) {
				t.Error("the file was changed")
			}
		})
	}
}

func sameContent(a, b *memFile) bool {
	return a.content.size == b.content.size && maps.EqualFunc(a.content.pages, b.content.pages, func(p, q *[memPageSize]byte) bool { return *p == *q })
}

// TestOpenForReading accepts what only forbids writing.
func TestOpenForReading(t *testing.T) {
	for _, bit := range []uint{0, 1} {
		f := hostileImage(t, 3)
		put64(f, 72, 1<<bit)
		img, err := Open(f, OpenOptions{ReadOnly: true})
		must(t, err)
		_, err = img.ReadAt(make([]byte, hostileDisk), 0)
		must(t, err)
		if _, err := img.WriteAt([]byte{1}, 0); !errors.Is(err, ErrReadOnly) {
			t.Errorf("write: %v", err)
		}
		must(t, img.Close())
	}
}

// TestCorruptMapping breaks one entry. Reading through it, where it says nothing sensible, and writing through it, where
// that would destroy metadata, fail with ErrCorrupt; all else of the image stays as it was.
func TestCorruptMapping(t *testing.T) {
	const beyond = 1 << 40
	copied := func(off int64) uint64 { return format.FlagCopied | uint64(off) }
	for _, test := range []struct {
		name        string
		version     int
		change      func(f *memFile)
		read, write bool // they must fail; what a write does not refuse, our check finds
	}{
		{"L1: reserved bits", 3, func(f *memFile) { put64(f, l1At(f), get64(f, l1At(f))|1) }, true, true},
		{"L1: high reserved bits", 3, func(f *memFile) { put64(f, l1At(f), get64(f, l1At(f))|1<<60) }, true, true},
		{"L1: behind the end", 3, func(f *memFile) { put64(f, l1At(f), copied(beyond)) }, true, true},
		{"L1: at the largest offset", 3, func(f *memFile) { put64(f, l1At(f), copied(format.OffsetMask)) }, true, true},
		{"L1: itself", 3, func(f *memFile) { put64(f, l1At(f), copied(l1At(f))) }, false, true},
		{"L1: the refcount table", 3, func(f *memFile) { put64(f, l1At(f), copied(refTableAt(f))) }, false, false},
		{"L1: a refcount block", 3, func(f *memFile) { put64(f, l1At(f), copied(refBlockAt(f))) }, false, false},
		{"L1: the snapshot table", 3, func(f *memFile) { put64(f, l1At(f), copied(snapshotTableAt(f))) }, false, false},
		{"L2: reserved bits", 3, func(f *memFile) { put64(f, l2At(f), get64(f, l2At(f))|2) }, true, true},
		{"L2: zero flag in version 2", 2, func(f *memFile) { put64(f, l2At(f), get64(f, l2At(f))|1) }, true, true},
		{"L2: behind the end", 3, func(f *memFile) { put64(f, l2At(f), copied(beyond)) }, true, true},
		{"L2: the active L1", 3, func(f *memFile) { put64(f, l2At(f), copied(l1At(f))) }, false, true},
		{"L2: itself", 3, func(f *memFile) { put64(f, l2At(f), copied(l2At(f))) }, false, false},
		{"L2: the refcount table", 3, func(f *memFile) { put64(f, l2At(f), copied(refTableAt(f))) }, false, true},
		{"L2: a refcount block", 3, func(f *memFile) { put64(f, l2At(f), copied(refBlockAt(f))) }, false, false},
		{"L2: the snapshot table", 3, func(f *memFile) { put64(f, l2At(f), copied(snapshotTableAt(f))) }, false, true},
		{"L2: a snapshot's L1", 3, func(f *memFile) { put64(f, l2At(f), copied(snapshotL1At(f))) }, false, false},
		{"L2: a snapshot's L2", 3, func(f *memFile) { put64(f, l2At(f), copied(snapshotL2At(f))) }, false, false},
		{"L2: compressed and COPIED", 3, func(f *memFile) { put64(f, l2At(f), format.FlagCopied|format.FlagCompressed|512) }, true, true},
		{"L2: compressed behind the end", 3, func(f *memFile) { put64(f, l2At(f), format.FlagCompressed|beyond) }, true, true},
		{"L2: compressed garbage", 3, func(f *memFile) { put64(f, l2At(f), format.FlagCompressed|uint64(l1At(f))) }, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := hostileImage(t, test.version)
			test.change(f)
			before := f.clone()
			img, err := Open(f, OpenOptions{})
			must(t, err)
			if _, err := img.ReadAt(make([]byte, 256), 0); test.read && !errors.Is(err, ErrCorrupt) {
				t.Errorf("read: %v", err)
			}
			if _, err := img.WriteAt(make([]byte, 256), 0); test.write && !errors.Is(err, ErrCorrupt) {
				t.Errorf("write: %v", err)
			}
			// Nothing that follows may panic or run for ever; it may fail.
			_ = img.WriteZeroes(0, 1024)
			_ = img.Discard(512, 512)
			_, _ = img.CreateSnapshot(t.Context(), "another", nil)
			_ = img.GotoSnapshot(t.Context(), ByName("snapshot"))
			_, _ = img.Check(t.Context(), nil)
			_ = img.Close()
			if r, err := checkFile(t.Context(), before); err != nil || r.Corruptions == 0 {
				t.Errorf("our check: %+v, %v", r, err)
			}
		})
	}
}

// TestZeroCounts: what the header says is metadata is not handed out, though it be counted as free.
func TestZeroCounts(t *testing.T) {
	f := hostileImage(t, 3)
	sound := f.clone()
	f.content.zero(refBlockAt(f), 512)
	img, err := Open(f, OpenOptions{})
	must(t, err)
	for off := int64(0); off < hostileDisk; off += 512 {
		if _, err := img.WriteAt(stamp(9, off, 512), off); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("write at %#x: %v", off, err)
		}
	}
	_ = img.Flush()
	for _, at := range []int64{refTableAt(sound), snapshotTableAt(sound)} {
		var want, got [8]byte
		sound.content.readAt(want[:], at)
		f.content.readAt(got[:], at)
		if got != want {
			t.Errorf("the metadata at %#x was overwritten", at)
		}
	}
	_ = img.Close()
}

package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const tableAt = 0x10000

// tableFile returns a file whose snapshot table is b, and a header that says so.
func tableFile(b []byte, rows int) (io.ReaderAt, *Header) {
	f := strings.NewReader(strings.Repeat("\x00", tableAt) + string(b))
	return f, &Header{Version: 3, ClusterBits: 16, Size: 5 << 20, Snapshots: int64(rows), SnapshotsOffset: tableAt}
}

// rawRow builds a row by hand.
func rawRow(l1Offset uint64, l1Size uint32, id, name string, vmStateSize uint32, extra []byte) []byte {
	be := binary.BigEndian
	b := be.AppendUint64(nil, l1Offset)
	b = be.AppendUint32(b, l1Size)
	b = be.AppendUint16(b, uint16(len(id)))
	b = be.AppendUint16(b, uint16(len(name)))
	b = be.AppendUint32(b, 1_700_000_000)
	b = be.AppendUint32(b, 999)
	b = be.AppendUint64(b, 77)
	b = be.AppendUint32(b, vmStateSize)
	b = be.AppendUint32(b, uint32(len(extra)))
	b = append(b, extra...)
	b = append(b, id...)
	return append(b, name...)
}

func extraData(vmState, disk, icount uint64, tail ...byte) []byte {
	be := binary.BigEndian
	b := be.AppendUint64(nil, vmState)
	b = be.AppendUint64(b, disk)
	b = be.AppendUint64(b, icount)
	return append(b, tail...)
}

func TestReadSnapshotTable(t *testing.T) {
	row := SnapshotRow{
		L1Offset: 0x20000, L1Size: 3, ID: "1", Name: "one", DateSec: 1_700_000_000, DateNsec: 999, VMClock: 77,
		VMStateSize: 5, DiskSize: 5 << 20, Icount: UnknownIcount,
	}
	with := func(change func(*SnapshotRow)) SnapshotRow {
		r := row
		change(&r)
		return r
	}
	full := extraData(1<<40, 1<<30, 9)
	for _, test := range []struct {
		name  string
		extra []byte
		want  SnapshotRow
	}{
		{"no extra data", nil, row},
		{"7 bytes: too short for anything", full[:7], with(func(r *SnapshotRow) { r.ExtraSize = 7 })},
		{"8 bytes: VM state size", full[:8], with(func(r *SnapshotRow) { r.ExtraSize, r.VMStateSize = 8, 1<<40 })},
		{"16 bytes: disk size", full[:16], with(func(r *SnapshotRow) { r.ExtraSize, r.VMStateSize, r.DiskSize = 16, 1<<40, 1<<30 })},
		{"24 bytes: icount", full, with(func(r *SnapshotRow) {
			r.ExtraSize, r.VMStateSize, r.DiskSize, r.Icount, r.Extra = 24, 1<<40, 1<<30, 9, []byte{}
		})},
		{"a tail of unknown meaning", append(bytes.Clone(full), "tail!"...), with(func(r *SnapshotRow) {
			r.ExtraSize, r.VMStateSize, r.DiskSize, r.Icount, r.Extra = 29, 1<<40, 1<<30, 9, []byte("tail!")
		})},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := rawRow(0x20000, 3, "1", "one", 5, test.extra)
			first := int64(len(b))
			b = append(b, make([]byte, Align8(first)-first)...)
			b = append(b, b...) // a second row, aligned
			b = b[:Align8(first)+first]
			f, h := tableFile(b, 2)
			rows, size, err := ReadSnapshotTable(f, h)
			if err != nil || size != int64(len(b)) {
				t.Fatalf("%d bytes, %v; want %d", size, err, len(b))
			}
			if want := []SnapshotRow{test.want, test.want}; !reflect.DeepEqual(rows, want) {
				t.Fatalf("got  %+v\nwant %+v", rows, want)
			}

			// Written and read again it is the same, with all of the extra data.
			encoded, err := EncodeSnapshotTable(rows)
			must(t, err)
			f, h = tableFile(encoded, 2)
			again, size, err := ReadSnapshotTable(f, h)
			if err != nil || size != int64(len(encoded)) {
				t.Fatalf("after encoding: %d bytes, %v; want %d", size, err, len(encoded))
			}
			for i := range again {
				if again[i].ExtraSize != int64(max(24, len(test.extra))) {
					t.Errorf("row %d was written with %d bytes of extra data", i, again[i].ExtraSize)
				}
				again[i].ExtraSize = rows[i].ExtraSize
				again[i].Extra, rows[i].Extra = append([]byte{}, again[i].Extra...), append([]byte{}, rows[i].Extra...)
			}
			if !reflect.DeepEqual(again, rows) {
				t.Fatalf("after encoding %+v\nbefore %+v", again, rows)
			}
		})
	}
}

func TestReadSnapshotTableRefuses(t *testing.T) {
	good := rawRow(0x20000, 1, "1", "one", 0, extraData(0, 1<<20, 0))
	for _, test := range []struct {
		name  string
		table []byte
		rows  int
		want  error
		says  string
	}{
		{"a count beyond the limit", good, MaxSnapshots + 1, ErrLimit, "65537 snapshots"},
		{"more rows than the file holds", good, MaxSnapshots, ErrCorrupt, "row 1 of 65536 at offset 0x10048"},
		{"the file ends in the fixed part", good[:39], 1, ErrCorrupt, "row 0 of 1 at offset 0x10000"},
		{"the file ends in the extra data", good[:41], 1, ErrCorrupt, "the file ends"},
		{"the file ends in the name", good[:len(good)-1], 1, ErrCorrupt, "the file ends"},
		{"too much extra data", rawRow(0x20000, 1, "1", "one", 0, make([]byte, 1025)), 1, ErrLimit, "1025 bytes of extra data"},
		{"an L1 too large", rawRow(0x20000, MaxL1Bytes/8+1, "1", "one", 0, nil), 1, ErrLimit, "L1 table of 4194305 entries"},
		{"an L1 that is not aligned", rawRow(0x20200, 1, "1", "one", 0, nil), 1, ErrCorrupt, "0x20200"},
		{"an L1 beyond what offsets can hold", rawRow(1<<56, 1, "1", "one", 0, nil), 1, ErrCorrupt, "L1 table at offset"},
		{"an L1 with a negative offset", rawRow(1<<63, 1, "1", "one", 0, nil), 1, ErrCorrupt, "L1 table at offset"},
		{"an L1 in the header", rawRow(0, 1, "1", "one", 0, nil), 1, ErrCorrupt, "offset 0"},
		{"a negative disk size", rawRow(0x20000, 1, "1", "one", 0, extraData(0, 1<<63, 0)), 1, ErrCorrupt, "disk of 9223372036854775808 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, h := tableFile(test.table, test.rows)
			_, _, err := ReadSnapshotTable(f, h)
			if !errors.Is(err, test.want) || !strings.Contains(fmt.Sprint(err), test.says) {
				t.Errorf("got %v, want %v and %q", err, test.want, test.says)
			}
		})
	}
	t.Run("a table larger than 64 MiB", func(t *testing.T) {
		long := rawRow(0x20000, 1, "", strings.Repeat("n", math.MaxUint16), 0, nil)
		rows := MaxSnapshotTableBytes/len(long) + 2
		f, h := tableFile(bytes.Repeat(append(long, make([]byte, Align8(int64(len(long)))-int64(len(long)))...), rows), rows)
		if _, _, err := ReadSnapshotTable(f, h); !errors.Is(err, ErrLimit) {
			t.Errorf("got %v, want ErrLimit", err)
		}
	})
	t.Run("an I/O error is not called corruption", func(t *testing.T) {
		_, h := tableFile(good, 1)
		broken := errors.New("broken disk")
		if _, _, err := ReadSnapshotTable(brokenDisk{broken}, h); !errors.Is(err, broken) || errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
}

type brokenDisk struct{ err error }

func (d brokenDisk) ReadAt([]byte, int64) (int, error) { return 0, d.err }

func TestEncodeSnapshotTableRefuses(t *testing.T) {
	long := strings.Repeat("n", math.MaxUint16)
	for _, test := range []struct {
		name string
		rows []SnapshotRow
	}{
		{"too many rows", make([]SnapshotRow, MaxSnapshots+1)},
		{"an id too long", []SnapshotRow{{ID: long + "n"}}},
		{"a name too long", []SnapshotRow{{Name: long + "n"}}},
		{"too much extra data", []SnapshotRow{{Extra: make([]byte, MaxSnapshotExtraBytes-SnapshotExtraBytes+1)}}},
		{"a table too large", slicesRepeat(SnapshotRow{Name: long}, MaxSnapshotTableBytes/math.MaxUint16+1)},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := EncodeSnapshotTable(test.rows); !errors.Is(err, ErrLimit) {
				t.Errorf("got %v, want ErrLimit", err)
			}
		})
	}
}

func slicesRepeat[T any](v T, n int) []T {
	s := make([]T, n)
	for i := range s {
		s[i] = v
	}
	return s
}

func TestSnapshotVMStateSizeOnDisk(t *testing.T) {
	for _, test := range []struct {
		size  uint64
		small uint32
	}{{0, 0}, {math.MaxUint32, math.MaxUint32}, {math.MaxUint32 + 1, 0}} {
		b, err := EncodeSnapshotTable([]SnapshotRow{{VMStateSize: test.size}})
		must(t, err)
		if got := binary.BigEndian.Uint32(b[32:]); got != test.small {
			t.Errorf("VM state of %d bytes: the 32-bit field is %d, want %d", test.size, got, test.small)
		}
		if got := binary.BigEndian.Uint64(b[40:]); got != test.size {
			t.Errorf("VM state of %d bytes: the 64-bit field is %d", test.size, got)
		}
	}
}

// TestSnapshotTableQEMU reads the tables that qemu-img wrote and encodes them to the same bytes.
func TestSnapshotTableQEMU(t *testing.T) {
	for _, compat := range []string{"0.10", "1.1"} {
		t.Run(compat, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "image.qcow2")
			qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "compat="+compat, path, "3M")
			names := []string{"a", "with space", "ünïcode", "a", strings.Repeat("x", 255)}
			for _, name := range names {
				qemuImg(t, "snapshot", "-c", name, path)
			}
			qemuImg(t, "snapshot", "-d", "a", path) // the first of two
			if compat == "1.1" {
				qemuImg(t, "resize", "-q", path, "5M")
			}
			f, err := os.Open(path)
			must(t, err)
			defer f.Close()
			first := make([]byte, 4096)
			_, err = f.ReadAt(first, 0)
			must(t, err)
			h, err := DecodeHeader(first)
			must(t, err)

			rows, size, err := ReadSnapshotTable(f, &h)
			must(t, err)
			if len(rows) != 4 {
				t.Fatalf("%d rows: %+v", len(rows), rows)
			}
			for i := range rows {
				s := &rows[i]
				if s.Name != names[i+1] || s.ID != fmt.Sprint(i+2) || s.DiskSize != 3<<20 {
					t.Errorf("row %d: %+v", i, *s)
				}
				if age := time.Since(time.Unix(int64(s.DateSec), 0)); age < -time.Minute || age > time.Hour {
					t.Errorf("row %d is dated %v", i, age)
				}
			}
			b, err := EncodeSnapshotTable(rows)
			must(t, err)
			onDisk := make([]byte, size)
			_, err = f.ReadAt(onDisk, int64(h.SnapshotsOffset))
			must(t, err)
			if !bytes.Equal(b, onDisk) {
				t.Errorf("encoded %x\non disk %x", b, onDisk)
			}
		})
	}
}

// TestSnapshotTableForQEMU lets qemu-img list a table of ours, with odd extra data in it.
func TestSnapshotTableForQEMU(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	b, err := EncodeSnapshotTable([]SnapshotRow{
		{ID: "7", Name: "first", DateSec: 1_700_000_000, VMStateSize: 3 << 30, DiskSize: 1 << 20, Icount: UnknownIcount, Extra: []byte("odd tail")},
		{ID: "x", Name: "second", DiskSize: 1 << 20},
	})
	must(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	const at = 1 << 20
	_, err = f.WriteAt(b, at)
	must(t, err)
	_, err = f.WriteAt(binary.BigEndian.AppendUint64([]byte{0, 0, 0, 2}, at), 60)
	must(t, err)
	list := qemuImg(t, "snapshot", "-l", path)
	for _, want := range []string{"7         first", "3 GiB", "x         second"} {
		if !strings.Contains(list, want) {
			t.Errorf("%q is not in what qemu-img lists:\n%s", want, list)
		}
	}
}

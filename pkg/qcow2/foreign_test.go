package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/klauspost/compress/zstd"
)

// This file reads what other writers leave and QEMU reads, too.

// TestStreamedZstd reads clusters that a streaming encoder has compressed, which does not know their size and asks for a large
// window.
func TestStreamedZstd(t *testing.T) {
	for _, size := range []int{4 << 10, 64 << 10, 2 << 20} {
		for _, window := range []int{1 << 10, 8 << 20, 128 << 20} {
			var packed bytes.Buffer
			w, err := zstd.NewWriter(&packed, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
			must(t, err)
			want := stamp(1, 0, int64(size))
			for i := 0; i < size; i += 1000 { // in pieces, with a flush: the first block is out before the end is known
				_, err := w.Write(want[i:min(i+1000, size)])
				must(t, err)
				must(t, w.Flush())
			}
			must(t, w.Close())
			if packed.Bytes()[4]>>6 != 0 || packed.Bytes()[4]&(1<<5) != 0 {
				t.Fatal("the frame names the size of its content")
			}
			src := append(packed.Bytes(), make([]byte, 300)...) // as long as its sectors
			z := format.Decompressor{Kind: format.CompressionZstd}
			got := make([]byte, size)
			if err := z.Decompress(got, src); err != nil || !bytes.Equal(got, want) {
				t.Errorf("clusters of %d bytes, window of %d: %v", size, window, err)
			}
		}
	}
}

// TestMissingL1 reads and repairs an image whose L1 table of zeros was left out at the end of the file. Where more is missing
// than zeros, it cannot be known.
func TestMissingL1(t *testing.T) {
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "64G") // 256 KiB of L1 table
	f := loadMemFile(t, path)
	h, err := format.ReadHeader(f, format.DecodeHeader)
	must(t, err)
	f.content.truncate(int64(h.L1Offset))
	f.save(t, path)
	qemuIO(t, path, "read -q -P 0 0 1M")
	img, err := Open(f.clone(), OpenOptions{ReadOnly: true})
	must(t, err)
	p := make([]byte, 1<<20)
	if _, err := img.ReadAt(p, 32<<30); err != nil || !bytes.Equal(p, make([]byte, len(p))) {
		t.Errorf("read: %v", err)
	}
	must(t, img.Close())
	if _, err := Open(f.clone(), OpenOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("opened for writing: %v", err)
	}

	lost := f.clone() // something was there
	lost.content.writeAt([]byte("data"), int64(h.L1Offset))
	if _, err := Repair(t.Context(), lost, RepairAll, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("repaired although nothing tells what leads to the data: %v", err)
	}
	if r := repairFile(t, f, RepairAll); r.Left.ExitStatus() != 0 {
		t.Errorf("repaired: %+v", r)
	}
	f.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Errorf("repaired, and QEMU says %s", q.output)
	}
	img, err = openAt(path, false)
	must(t, err)
	_, err = img.WriteAt(binary.BigEndian.AppendUint64(nil, 7), 1<<30)
	must(t, errors.Join(err, img.Close()))
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Errorf("written, and QEMU says %s", q.output)
	}
}

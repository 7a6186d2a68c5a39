package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// rawHeader is the first cluster of an image of version 3.
func rawHeader() []byte {
	b := make([]byte, 64<<10)
	be := binary.BigEndian
	be.PutUint32(b[0:], Magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], 1<<30) // size
	be.PutUint32(b[36:], 2)     // L1 entries
	be.PutUint64(b[40:], 3<<16) // L1 table
	be.PutUint64(b[48:], 1<<16) // refcount table
	be.PutUint32(b[56:], 1)     // clusters of it
	be.PutUint32(b[96:], 4)     // refcount order
	be.PutUint32(b[100:], HeaderLengthV3)
	copy(b[HeaderLengthV3:], "\x12\x34\x56\x78\x00\x00\x00\x04what") // an extension that nobody knows
	return b
}

// TestHeader changes what selects the metadata, and no other byte.
func TestHeader(t *testing.T) {
	b := rawHeader()
	h, err := DecodeHeader(b)
	must(t, err)
	if !bytes.Equal(h.Encode(), b[:SectorSize]) {
		t.Error("a header that did not change is encoded to other bytes")
	}
	h.Size, h.L1Offset, h.Snapshots, h.SnapshotsOffset = 1<<29, 9<<16, 2, 8<<16
	h.Incompatible |= IncompatCorrupt
	sector := h.Encode()
	for i := range sector {
		if selects := i >= 24 && i < 32 || i >= 40 && i < 48 || i >= 60 && i < 80; !selects && sector[i] != b[i] {
			t.Errorf("byte %d changed", i)
		}
	}
	again, err := DecodeHeader(append(sector, b[SectorSize:]...))
	must(t, err)
	if again.Size != 1<<29 || again.L1Offset != 9<<16 || again.Snapshots != 2 || again.SnapshotsOffset != 8<<16 || again.Incompatible != IncompatCorrupt {
		t.Errorf("%+v", again)
	}
}

func TestHeaderRefuses(t *testing.T) {
	be := binary.BigEndian
	for name, c := range map[string]struct {
		change func(b []byte)
		want   error
	}{
		"no magic":                   {func(b []byte) { b[0] = 0 }, ErrUnsupported},
		"version 4":                  {func(b []byte) { b[7] = 4 }, ErrUnsupported},
		"clusters of 256 bytes":      {func(b []byte) { b[23] = 8 }, ErrUnsupported},
		"clusters of 4 MiB":          {func(b []byte) { b[23] = 22 }, ErrUnsupported},
		"a backing file":             {func(b []byte) { b[15] = 104 }, ErrUnsupported},
		"encryption":                 {func(b []byte) { b[35] = 2 }, ErrUnsupported},
		"an unknown feature":         {func(b []byte) { b[72] = 1 }, ErrUnsupported},
		"refcounts of 128 bits":      {func(b []byte) { b[99] = 7 }, ErrCorrupt},
		"a short L1 table":           {func(b []byte) { b[39] = 1 }, ErrCorrupt},
		"an L1 table in the header":  {func(b []byte) { be.PutUint64(b[40:], 0) }, ErrCorrupt},
		"an L1 table out of line":    {func(b []byte) { be.PutUint64(b[40:], 3<<16+512) }, ErrCorrupt},
		"no refcount table":          {func(b []byte) { b[59] = 0 }, ErrCorrupt},
		"too large a refcount table": {func(b []byte) { b[58] = 1 }, ErrLimit},
		"too large a disk":           {func(b []byte) { b[24] = 0x7f }, ErrLimit},
		"too many snapshots":         {func(b []byte) { b[60] = 1 }, ErrLimit},
		"an endless extension":       {func(b []byte) { b[HeaderLengthV3+4] = 1 }, ErrCorrupt},
	} {
		b := rawHeader()
		c.change(b)
		if _, err := DecodeHeader(b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

package format

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"strings"
)

// What the header's fields hold.
const (
	Magic = 0x514649fb // "QFI\xfb"

	headerLengthV2 = 72
	HeaderLengthV3 = 104

	IncompatDirty       = 1 << 0
	IncompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	IncompatCompression = 1 << 3
	IncompatExtendedL2  = 1 << 4

	CompatLazyRefcounts = 1 << 0

	AutoclearBitmaps = 1 << 0 // the bitmaps extension is consistent

	extEnd          = 0x00000000
	ExtFeatureNames = 0x6803f857
	ExtBitmaps      = 0x23852875
)

// Header is the image header (specification: "Header"). The fields that select the metadata
// generation lie in bytes 24-71, in one sector: Encode changes them there and leaves every other byte
// as it was read, so that one sector write switches all of them.
type Header struct {
	Version     int
	ClusterBits uint

	Size             int64      // bytes 24-31: virtual disk size
	L1Size           int64      // bytes 36-39: entries
	L1Offset         HostOffset // bytes 40-47
	RefTableOffset   HostOffset // bytes 48-55
	RefTableClusters int64      // bytes 56-59
	Snapshots        int64      // bytes 60-63: rows in the snapshot table
	SnapshotsOffset  HostOffset // bytes 64-71
	Incompatible     uint64     // bytes 72-79, version 3 and later as all below
	Compatible       uint64     // bytes 80-87
	Autoclear        uint64     // bytes 88-95; none in the header of an image that is open for writing
	RefcountOrder    uint       // bytes 96-99
	Length           int64      // bytes 100-103
	CompressionType  uint8      // byte 104

	Bitmaps []byte // data of the bitmaps extension, nil if there is none

	Sector [SectorSize]byte // the first sector as it is on disk
}

// DecodeHeader checks every field that is later used to shift, to allocate or to seek. b is the
// start of the file, at most one cluster and at least one sector.
func DecodeHeader(b []byte) (Header, error) {
	h, err := ParseHeader(b)
	if err == nil {
		err = cmp.Or(h.Checkable(), h.CheckL1Table(), h.checkRefcountTable(), h.CheckSnapshotTable())
	}
	return h, err
}

// ParseHeader is DecodeHeader but for what the checker judges: that there is an L1 table, and the pointers to what can be
// rebuilt or cut, the refcount table and the snapshot table.
func ParseHeader(b []byte) (Header, error) {
	h, err := parseFixed(b)
	if err != nil {
		return h, err
	}
	if err := h.refuse(b); err != nil {
		return h, err
	}
	return h, h.decodeGeneration()
}

// PeekHeader is ParseHeader for one that looks at the image and does not use it: of any features, and b need only be the first
// sector.
func PeekHeader(b []byte) (Header, error) {
	h, err := parseFixed(b)
	if err != nil {
		return h, err
	}
	return h, h.decodeGeneration()
}

// parseFixed reads what follows from no other field, and nothing of the generation.
func parseFixed(b []byte) (Header, error) {
	var h Header
	if len(b) < SectorSize || binary.BigEndian.Uint32(b) != Magic {
		return h, fmt.Errorf("%w: not a qcow2 image (no magic at offset 0)", ErrUnsupported)
	}
	copy(h.Sector[:], b)
	be32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	be64 := func(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }

	h.Version = int(be32(4))
	if h.Version != 2 && h.Version != 3 {
		return h, fmt.Errorf("%w: qcow2 version %d", ErrUnsupported, be32(4))
	}
	if be32(20) < MinClusterBits || be32(20) > MaxClusterBits {
		return h, fmt.Errorf("%w: cluster_bits %d at header offset 20, legal are %d to %d",
			ErrUnsupported, be32(20), MinClusterBits, MaxClusterBits)
	}
	h.ClusterBits = uint(be32(20))
	h.RefcountOrder, h.Length = 4, headerLengthV2
	if h.Version >= 3 {
		h.Incompatible, h.Compatible, h.Autoclear = be64(72), be64(80), be64(88)
		if be32(96) > 6 {
			return h, fmt.Errorf("%w: refcount_order %d at header offset 96", ErrCorrupt, be32(96))
		}
		h.RefcountOrder, h.Length = uint(be32(96)), int64(be32(100))
		if h.Length < HeaderLengthV3 || h.Length%8 != 0 || h.Length > 1<<h.ClusterBits {
			return h, fmt.Errorf("%w: header_length %d at header offset 100", ErrCorrupt, h.Length)
		}
		if h.Length > HeaderLengthV3 {
			h.CompressionType = b[104]
		}
	}
	return h, nil
}

// refuse names the features that a legal image may have and we do not serve.
func (h *Header) refuse(b []byte) error {
	be32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	unsupported := func(what string, args ...any) error {
		return fmt.Errorf("%w: "+what, append([]any{ErrUnsupported}, args...)...)
	}
	switch {
	case binary.BigEndian.Uint64(b[8:]) != 0 || be32(16) != 0:
		return unsupported("the image has a backing file")
	case be32(32) != 0:
		return unsupported("the image is encrypted (crypt_method %d)", be32(32))
	case h.Incompatible&incompatDataFile != 0:
		return unsupported("the image keeps its data in an external file")
	case h.Incompatible&IncompatExtendedL2 != 0 && h.ClusterBits < MinExtendedClusterBits:
		return fmt.Errorf("%w: extended L2 entries with clusters of %d bytes, at least %d are due", ErrCorrupt, 1<<h.ClusterBits, 1<<MinExtendedClusterBits)
	case h.CompressionType > CompressionZstd:
		return unsupported("compression type %d", h.CompressionType)
	case (h.Incompatible&IncompatCompression != 0) != (h.CompressionType != compressionDeflate):
		return fmt.Errorf("%w: compression type %d contradicts incompatible feature bit 3", ErrCorrupt, h.CompressionType)
	}
	unknown := h.Incompatible &^ (IncompatDirty | IncompatCorrupt | IncompatCompression | IncompatExtendedL2)
	names, err := h.readExtensions(b, unknown)
	if err != nil {
		return err
	}
	if unknown != 0 {
		return unsupported("unknown incompatible features %#x %s", unknown, names)
	}
	return nil
}

// readExtensions walks the header extensions, keeps what is needed and returns the image's own names for
// the feature bits in unknown.
func (h *Header) readExtensions(b []byte, unknown uint64) (string, error) {
	var names []string
	at, end := h.Length, min(int64(len(b)), int64(1)<<h.ClusterBits)
	for at+8 <= end {
		kind, n := binary.BigEndian.Uint32(b[at:]), int64(binary.BigEndian.Uint32(b[at+4:]))
		if kind == extEnd {
			break
		}
		at += 8
		if n > end-at {
			return "", fmt.Errorf("%w: header extension %#x at offset %d has %d bytes, the cluster ends before",
				ErrCorrupt, kind, at-8, n)
		}
		data := b[at : at+n]
		switch kind {
		case ExtFeatureNames:
			for ; len(data) >= 48; data = data[48:] {
				if data[0] == 0 && data[1] < 64 && unknown&(1<<data[1]) != 0 {
					names = append(names, fmt.Sprintf("%q", bytes.TrimRight(data[2:48], "\x00")))
				}
			}
		case ExtBitmaps:
			h.Bitmaps = bytes.Clone(data)
		}
		at += (n + 7) &^ 7
	}
	return strings.Join(names, ", "), nil
}

// Geometry of the image.
func (h *Header) Geometry() Geometry {
	return NewGeometry(h.ClusterBits, h.RefcountOrder, h.Incompatible&IncompatExtendedL2 != 0)
}

// decodeGeneration reads bytes 24-71 and checks those that nothing else tells: the disk's size and its L1 table.
func (h *Header) decodeGeneration() error {
	g := h.Geometry()
	be32 := func(at int) int64 { return int64(binary.BigEndian.Uint32(h.Sector[at:])) }
	be64 := func(at int) int64 { return int64(binary.BigEndian.Uint64(h.Sector[at:])) }
	h.L1Size, h.L1Offset = be32(36), HostOffset(be64(40))
	h.RefTableOffset, h.RefTableClusters = HostOffset(be64(48)), be32(56)
	h.Snapshots, h.SnapshotsOffset = be32(60), HostOffset(be64(64))

	h.Size = be64(24)
	switch {
	case h.Size < 0 || g.L1Entries(h.Size) > MaxL1Bytes/8:
		return fmt.Errorf("%w: a disk of %d bytes needs more than %d MiB of L1 table", ErrLimit, uint64(h.Size), MaxL1Bytes>>20)
	case h.L1Size > MaxL1Bytes/8:
		return fmt.Errorf("%w: L1 table of %d entries", ErrLimit, h.L1Size)
	case h.L1Size < g.L1Entries(h.Size):
		return fmt.Errorf("%w: L1 table of %d entries is too small for a disk of %d bytes", ErrCorrupt, h.L1Size, h.Size)
	}
	return h.checkAligned("l1_table_offset", 40, h.L1Offset)
}

// CheckL1Table refuses an L1 table that cannot be where the header says.
func (h *Header) CheckL1Table() error {
	return h.checkTable("the L1 table", h.L1Size, "l1_table_offset", 40, h.L1Offset)
}

// checkPointer refuses an offset that no cluster can have, at byte at of the header.
func (h *Header) checkPointer(name string, at int, off HostOffset) error {
	if off >= MaxHostOffset {
		return fmt.Errorf("%w: %s %#x at header offset %d", ErrCorrupt, name, off, at)
	}
	return h.checkAligned(name, at, off)
}

// checkAligned lets offsets pass that lie behind the end of any file: the checker judges them, as QEMU does.
func (h *Header) checkAligned(name string, at int, off HostOffset) error {
	if off < 0 || off&(1<<h.ClusterBits-1) != 0 {
		return fmt.Errorf("%w: %s %#x at header offset %d", ErrCorrupt, name, uint64(off), at)
	}
	return nil
}

func (h *Header) checkRefcountTable() error {
	if h.RefTableClusters == 0 || h.RefTableOffset == 0 {
		return fmt.Errorf("%w: the image has no refcount table", ErrCorrupt)
	}
	return h.checkPointer("refcount_table_offset", 48, h.RefTableOffset)
}

// CheckSnapshotTable refuses a snapshot table that cannot be where the header says.
func (h *Header) CheckSnapshotTable() error {
	return h.checkTable("the snapshot table", h.Snapshots, "snapshots_offset", 64, h.SnapshotsOffset)
}

// checkTable refuses the offset of a table, at byte at of the header, unless the table is empty: nothing is read then.
func (h *Header) checkTable(table string, entries int64, name string, at int, off HostOffset) error {
	switch {
	case entries == 0:
		return h.checkAligned(name, at, off)
	case off == 0:
		return fmt.Errorf("%w: %s is at offset 0, in the header", ErrCorrupt, table)
	}
	return h.checkPointer(name, at, off)
}

// Checkable refuses what a check cannot begin with.
func (h *Header) Checkable() error {
	switch {
	case h.RefTableClusters > MaxRefcountTableBytes>>h.ClusterBits:
		return fmt.Errorf("%w: refcount table of %d clusters", ErrLimit, h.RefTableClusters)
	case h.Snapshots > MaxSnapshots:
		return fmt.Errorf("%w: %d snapshots", ErrLimit, h.Snapshots)
	}
	return cmp.Or(h.checkAligned("refcount_table_offset", 48, h.RefTableOffset),
		h.checkAligned("snapshots_offset", 64, h.SnapshotsOffset))
}

// Encode returns the first sector with this generation's fields. Everything else stays as read.
func (h *Header) Encode() []byte {
	s := h.Sector
	binary.BigEndian.PutUint64(s[24:], uint64(h.Size))
	binary.BigEndian.PutUint32(s[36:], uint32(h.L1Size))
	binary.BigEndian.PutUint64(s[40:], uint64(h.L1Offset))
	binary.BigEndian.PutUint64(s[48:], uint64(h.RefTableOffset))
	binary.BigEndian.PutUint32(s[56:], uint32(h.RefTableClusters))
	binary.BigEndian.PutUint32(s[60:], uint32(h.Snapshots))
	binary.BigEndian.PutUint64(s[64:], uint64(h.SnapshotsOffset))
	if h.Version >= 3 {
		binary.BigEndian.PutUint64(s[72:], h.Incompatible)
		binary.BigEndian.PutUint64(s[88:], h.Autoclear)
	}
	return s[:]
}

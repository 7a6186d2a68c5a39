package qcow2

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	headerLengthV2 = 72
	headerLengthV3 = 104

	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4

	compatLazyRefcounts = 1 << 0

	extEnd          = 0x00000000
	extFeatureNames = 0x6803f857
	extBitmaps      = 0x23852875
)

// header is the image header (specification: "Header"). The fields that select the metadata
// generation lie in bytes 24-71, in one sector: encode changes them there and leaves every other byte
// as it was read, so that one sector write switches all of them.
type header struct {
	version     int
	clusterBits uint

	size             int64  // bytes 24-31: virtual disk size
	l1Size           int64  // bytes 36-39: entries
	l1Offset         int64  // bytes 40-47
	refTableOffset   int64  // bytes 48-55
	refTableClusters int64  // bytes 56-59
	snapshots        int64  // bytes 60-63: rows in the snapshot table
	snapshotsOffset  int64  // bytes 64-71
	incompatible     uint64 // bytes 72-79, version 3 and later as all below
	compatible       uint64 // bytes 80-87
	autoclear        uint64 // bytes 88-95; none in the header of an image that is open for writing
	refcountOrder    uint   // bytes 96-99
	length           int64  // bytes 100-103
	compressionType  uint8  // byte 104

	bitmaps []byte // data of the bitmaps extension, nil if there is none

	sector [sectorSize]byte // the first sector as it is on disk
}

// decodeHeader checks every field that is later used to shift, to allocate or to seek. b is the
// start of the file, at most one cluster and at least one sector.
func decodeHeader(b []byte) (header, error) {
	h, err := parseHeader(b)
	if err == nil {
		err = cmp.Or(h.checkable(), h.checkL1Table(), h.checkRefcountTable(), h.checkSnapshotTable())
	}
	return h, err
}

// parseHeader is decodeHeader but for what the checker judges: that there is an L1 table, and the pointers to what can be
// rebuilt or cut, the refcount table and the snapshot table.
func parseHeader(b []byte) (header, error) {
	var h header
	if len(b) < sectorSize || binary.BigEndian.Uint32(b) != magic {
		return h, fmt.Errorf("%w: not a qcow2 image (no magic at offset 0)", ErrUnsupported)
	}
	copy(h.sector[:], b)
	be32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	be64 := func(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }

	h.version = int(be32(4))
	if h.version != 2 && h.version != 3 {
		return h, fmt.Errorf("%w: qcow2 version %d", ErrUnsupported, be32(4))
	}
	if be32(20) < minClusterBits || be32(20) > maxClusterBits {
		return h, fmt.Errorf("%w: cluster_bits %d at header offset 20, legal are %d to %d",
			ErrUnsupported, be32(20), minClusterBits, maxClusterBits)
	}
	h.clusterBits = uint(be32(20))
	h.refcountOrder, h.length = 4, headerLengthV2
	if h.version >= 3 {
		h.incompatible, h.compatible, h.autoclear = be64(72), be64(80), be64(88)
		if be32(96) > 6 {
			return h, fmt.Errorf("%w: refcount_order %d at header offset 96", ErrCorrupt, be32(96))
		}
		h.refcountOrder, h.length = uint(be32(96)), int64(be32(100))
		if h.length < headerLengthV3 || h.length%8 != 0 || h.length > 1<<h.clusterBits {
			return h, fmt.Errorf("%w: header_length %d at header offset 100", ErrCorrupt, h.length)
		}
		if h.length > headerLengthV3 {
			h.compressionType = b[104]
		}
	}
	if err := h.refuse(b); err != nil {
		return h, err
	}
	return h, h.decodeGeneration()
}

// refuse names the features that a legal image may have and we do not serve.
func (h *header) refuse(b []byte) error {
	be32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	unsupported := func(what string, args ...any) error {
		return fmt.Errorf("%w: "+what, append([]any{ErrUnsupported}, args...)...)
	}
	switch {
	case binary.BigEndian.Uint64(b[8:]) != 0 || be32(16) != 0:
		return unsupported("the image has a backing file")
	case be32(32) != 0:
		return unsupported("the image is encrypted (crypt_method %d)", be32(32))
	case h.incompatible&incompatDataFile != 0:
		return unsupported("the image keeps its data in an external file")
	case h.incompatible&incompatExtendedL2 != 0 && h.clusterBits < minExtendedClusterBits:
		return fmt.Errorf("%w: extended L2 entries with clusters of %d bytes, at least %d are due", ErrCorrupt, 1<<h.clusterBits, 1<<minExtendedClusterBits)
	case h.compressionType > compressionZstd:
		return unsupported("compression type %d", h.compressionType)
	case (h.incompatible&incompatCompression != 0) != (h.compressionType != compressionDeflate):
		return fmt.Errorf("%w: compression type %d contradicts incompatible feature bit 3", ErrCorrupt, h.compressionType)
	}
	unknown := h.incompatible &^ (incompatDirty | incompatCorrupt | incompatCompression | incompatExtendedL2)
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
func (h *header) readExtensions(b []byte, unknown uint64) (string, error) {
	var names []string
	at, end := h.length, min(int64(len(b)), int64(1)<<h.clusterBits)
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
		case extFeatureNames:
			for ; len(data) >= 48; data = data[48:] {
				if data[0] == 0 && data[1] < 64 && unknown&(1<<data[1]) != 0 {
					names = append(names, fmt.Sprintf("%q", bytes.TrimRight(data[2:48], "\x00")))
				}
			}
		case extBitmaps:
			h.bitmaps = bytes.Clone(data)
		}
		at += (n + 7) &^ 7
	}
	return strings.Join(names, ", "), nil
}

// geometry of the image.
func (h *header) geometry() geometry {
	return newGeometry(h.clusterBits, h.refcountOrder, h.incompatible&incompatExtendedL2 != 0)
}

// decodeGeneration reads bytes 24-71 and checks those that nothing else tells: the disk's size and its L1 table.
func (h *header) decodeGeneration() error {
	g := h.geometry()
	be32 := func(at int) int64 { return int64(binary.BigEndian.Uint32(h.sector[at:])) }
	be64 := func(at int) int64 { return int64(binary.BigEndian.Uint64(h.sector[at:])) }
	h.l1Size, h.l1Offset = be32(36), be64(40)
	h.refTableOffset, h.refTableClusters = be64(48), be32(56)
	h.snapshots, h.snapshotsOffset = be32(60), be64(64)

	h.size = be64(24)
	switch {
	case h.size < 0 || g.l1Entries(h.size) > maxL1Bytes/8:
		return fmt.Errorf("%w: a disk of %d bytes needs more than %d MiB of L1 table", ErrLimit, uint64(h.size), maxL1Bytes>>20)
	case h.l1Size > maxL1Bytes/8:
		return fmt.Errorf("%w: L1 table of %d entries", ErrLimit, h.l1Size)
	case h.l1Size < g.l1Entries(h.size):
		return fmt.Errorf("%w: L1 table of %d entries is too small for a disk of %d bytes", ErrCorrupt, h.l1Size, h.size)
	}
	return h.checkAligned("l1_table_offset", 40, h.l1Offset)
}

func (h *header) checkL1Table() error {
	return h.checkTable("the L1 table", h.l1Size, "l1_table_offset", 40, h.l1Offset)
}

// checkPointer refuses an offset that no cluster can have, at byte at of the header.
func (h *header) checkPointer(name string, at int, off int64) error {
	if off >= maxHostOffset {
		return fmt.Errorf("%w: %s %#x at header offset %d", ErrCorrupt, name, off, at)
	}
	return h.checkAligned(name, at, off)
}

// checkAligned lets offsets pass that lie behind the end of any file: the checker judges them, as QEMU does.
func (h *header) checkAligned(name string, at int, off int64) error {
	if off < 0 || off&(1<<h.clusterBits-1) != 0 {
		return fmt.Errorf("%w: %s %#x at header offset %d", ErrCorrupt, name, uint64(off), at)
	}
	return nil
}

func (h *header) checkRefcountTable() error {
	if h.refTableClusters == 0 || h.refTableOffset == 0 {
		return fmt.Errorf("%w: the image has no refcount table", ErrCorrupt)
	}
	return h.checkPointer("refcount_table_offset", 48, h.refTableOffset)
}

func (h *header) checkSnapshotTable() error {
	return h.checkTable("the snapshot table", h.snapshots, "snapshots_offset", 64, h.snapshotsOffset)
}

// checkTable refuses the offset of a table, at byte at of the header, unless the table is empty: nothing is read then.
func (h *header) checkTable(table string, entries int64, name string, at int, off int64) error {
	switch {
	case entries == 0:
		return h.checkAligned(name, at, off)
	case off == 0:
		return fmt.Errorf("%w: %s is at offset 0, in the header", ErrCorrupt, table)
	}
	return h.checkPointer(name, at, off)
}

// checkable refuses what a check cannot begin with.
func (h *header) checkable() error {
	switch {
	case h.refTableClusters > maxRefcountTableBytes>>h.clusterBits:
		return fmt.Errorf("%w: refcount table of %d clusters", ErrLimit, h.refTableClusters)
	case h.snapshots > maxSnapshots:
		return fmt.Errorf("%w: %d snapshots", ErrLimit, h.snapshots)
	}
	return cmp.Or(h.checkAligned("refcount_table_offset", 48, h.refTableOffset),
		h.checkAligned("snapshots_offset", 64, h.snapshotsOffset))
}

// encode returns the first sector with this generation's fields. Everything else stays as read.
func (h *header) encode() []byte {
	s := h.sector
	binary.BigEndian.PutUint64(s[24:], uint64(h.size))
	binary.BigEndian.PutUint32(s[36:], uint32(h.l1Size))
	binary.BigEndian.PutUint64(s[40:], uint64(h.l1Offset))
	binary.BigEndian.PutUint64(s[48:], uint64(h.refTableOffset))
	binary.BigEndian.PutUint32(s[56:], uint32(h.refTableClusters))
	binary.BigEndian.PutUint32(s[60:], uint32(h.snapshots))
	binary.BigEndian.PutUint64(s[64:], uint64(h.snapshotsOffset))
	if h.version >= 3 {
		binary.BigEndian.PutUint64(s[72:], h.incompatible)
		binary.BigEndian.PutUint64(s[88:], h.autoclear)
	}
	return s[:]
}

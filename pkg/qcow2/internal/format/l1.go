package format

import (
	"encoding/binary"
	"fmt"
)

// L1Entry points at an L2 table: bits 9-55 host offset, bit 63 COPIED.
type L1Entry uint64

// Offset returns the file offset of the L2 table, 0 if there is none.
func (e L1Entry) Offset() HostOffset { return HostOffset(e & OffsetMask) }

// Copied tells whether no other L1 entry points at the L2 table, so that it may be changed in place.
func (e L1Entry) Copied() bool { return e&FlagCopied != 0 }

// Check refuses an entry that no legal image holds.
func (e L1Entry) Check(g Geometry) error {
	switch {
	case e&L1Reserved != 0:
		return fmt.Errorf("%w: reserved bits set in L1 entry %#x", ErrCorrupt, uint64(e))
	case !g.Aligned(e.Offset()):
		return fmt.Errorf("%w: L2 table offset %#x is not aligned to a cluster", ErrCorrupt, e.Offset())
	}
	return nil
}

// DecodeL1 returns the entries of an L1 table's bytes.
func DecodeL1(b []byte) []L1Entry {
	l1 := make([]L1Entry, len(b)/8)
	for i := range l1 {
		l1[i] = L1Entry(binary.BigEndian.Uint64(b[i*8:]))
	}
	return l1
}

// EncodeL1 returns the bytes of an L1 table.
func EncodeL1(l1 []L1Entry) []byte {
	b := make([]byte, len(l1)*8)
	for i, e := range l1 {
		binary.BigEndian.PutUint64(b[i*8:], uint64(e))
	}
	return b
}

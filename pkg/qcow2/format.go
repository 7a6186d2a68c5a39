package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Limits of the format and of its implementations: QEMU refuses what is larger, so do we.
const (
	minClusterBits = 9
	maxClusterBits = 21

	maxL1Bytes            = 32 << 20
	maxRefcountTableBytes = 8 << 20
	maxSnapshots          = 65536
	maxSnapshotTableBytes = 64 << 20
	maxSnapshotExtraBytes = 1024

	// sectorSize is the unit that a disk writes whole or not at all.
	sectorSize = 512

	// DefaultClusterSize is the cluster size of images that name none, in bytes.
	DefaultClusterSize = 64 << 10
)

const (
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0

	// offsetMask selects bits 9-55, the host offset in L1 and standard L2 entries.
	offsetMask = 0x00fffffffffffe00
	// maxHostOffset bounds every host offset: what bits 9-55 can hold.
	maxHostOffset = 1 << 56

	l1Reserved       = 0x7f000000000001ff
	l2Reserved       = 0x3f000000000001fe
	refTableReserved = 0x1ff
)

// geometry is what follows from an image's cluster size.
type geometry struct {
	clusterBits   uint
	clusterSize   int64
	l2Bits        uint  // log2 of the entries in an L2 table
	l2Entries     int64 // entries in an L2 table, which fills one cluster
	l2Coverage    int64 // guest bytes under one L2 table
	refcountOrder uint  // log2 of the bits of a refcount
	blockBits     uint  // log2 of the counts in a refcount block
	blockCounts   int64 // counts in a refcount block, which fills one cluster
}

// newGeometry takes checked cluster bits (9..21) and refcount order (0..6).
func newGeometry(clusterBits, refcountOrder uint) geometry {
	return geometry{
		clusterBits:   clusterBits,
		clusterSize:   1 << clusterBits,
		l2Bits:        clusterBits - 3,
		l2Entries:     1 << (clusterBits - 3),
		l2Coverage:    1 << (2*clusterBits - 3),
		refcountOrder: refcountOrder,
		blockBits:     clusterBits + 3 - refcountOrder,
		blockCounts:   1 << (clusterBits + 3 - refcountOrder),
	}
}

// clusters returns how many clusters n bytes need.
func (g geometry) clusters(n int64) int64 { return (n + g.clusterSize - 1) >> g.clusterBits }

// aligned tells whether a host or guest offset is the first byte of a cluster.
func (g geometry) aligned(off int64) bool { return off&(g.clusterSize-1) == 0 }

// inCluster is the part of off below the cluster size.
func (g geometry) inCluster(off int64) int64 { return off & (g.clusterSize - 1) }

// l1Entries returns the L1 size that a disk of size bytes needs.
func (g geometry) l1Entries(size int64) int64 { return (size + g.l2Coverage - 1) / g.l2Coverage }

func (g geometry) l1Index(guest int64) int64 { return guest / g.l2Coverage }
func (g geometry) l2Index(guest int64) int64 { return guest >> g.clusterBits & (g.l2Entries - 1) }

// l1Entry points at an L2 table: bits 9-55 host offset, bit 63 COPIED.
type l1Entry uint64

func (e l1Entry) offset() int64 { return int64(e & offsetMask) }
func (e l1Entry) copied() bool  { return e&flagCopied != 0 }

// check refuses an entry that no legal image holds.
func (e l1Entry) check(g geometry) error {
	switch {
	case e&l1Reserved != 0:
		return fmt.Errorf("%w: reserved bits set in L1 entry %#x", ErrCorrupt, uint64(e))
	case !g.aligned(e.offset()):
		return fmt.Errorf("%w: L2 table offset %#x is not aligned to a cluster", ErrCorrupt, e.offset())
	}
	return nil
}

// l2Entry maps one guest cluster: bit 0 zero flag, bits 9-55 host offset, bit 62 compressed,
// bit 63 COPIED. A compressed entry has a layout of its own, see compressed.
type l2Entry uint64

// clusterKind is the state of a guest cluster.
type clusterKind uint8

const (
	kindUnallocated clusterKind = iota // reads as zeros
	kindZero                           // reads as zeros; no host cluster
	kindZeroAlloc                      // reads as zeros; the host cluster is kept
	kindData
	kindCompressed
)

func (k clusterKind) readsZero() bool { return k <= kindZeroAlloc }

// kind tests bit 62 before bit 0, which a compressed entry uses for its offset.
func (e l2Entry) kind() clusterKind {
	switch {
	case e&flagCompressed != 0:
		return kindCompressed
	case e&flagZero != 0 && e&offsetMask != 0:
		return kindZeroAlloc
	case e&flagZero != 0:
		return kindZero
	case e&offsetMask != 0:
		return kindData
	}
	return kindUnallocated
}

// offset is the host cluster of a standard entry, 0 if it has none.
func (e l2Entry) offset() int64 { return int64(e & offsetMask) }
func (e l2Entry) copied() bool  { return e&flagCopied != 0 }

// own tells that the active state alone holds the host cluster and may write it in place.
func (e l2Entry) own() bool { return e&(flagCopied|flagCompressed) == flagCopied && e.offset() != 0 }

// compressed returns where the compressed bytes lie. The length is rounded up to sectors: the
// stream may end earlier.
func (e l2Entry) compressed(g geometry) (off, length int64) {
	x := 62 - (g.clusterBits - 8)
	off = int64(uint64(e) & (1<<x - 1))
	sectors := int64(uint64(e) & (flagCompressed - 1) >> x)
	return off, (sectors+1)*sectorSize - off&(sectorSize-1)
}

// check refuses an entry that no legal image holds.
func (e l2Entry) check(g geometry, version int) error {
	if e&flagCompressed != 0 {
		if e&flagCopied != 0 {
			return fmt.Errorf("%w: compressed L2 entry %#x has COPIED set", ErrCorrupt, uint64(e))
		}
		return nil
	}
	switch {
	case e&l2Reserved != 0:
		return fmt.Errorf("%w: reserved bits set in L2 entry %#x", ErrCorrupt, uint64(e))
	case e&flagZero != 0 && version < 3:
		return fmt.Errorf("%w: zero flag in L2 entry %#x of a version 2 image", ErrCorrupt, uint64(e))
	case !g.aligned(e.offset()):
		return fmt.Errorf("%w: data cluster offset %#x is not aligned", ErrCorrupt, e.offset())
	}
	return nil
}

// offsetOf is what the entry points at, for either kind: entries that differ in it hold different references.
func (e l2Entry) offsetOf() uint64 {
	if e&flagCompressed != 0 {
		return uint64(e)
	}
	return uint64(e & offsetMask)
}

// hostClusters returns the host clusters that an entry references: one, none, or for a
// compressed entry each that its bytes touch.
func (e l2Entry) hostClusters(g geometry) (first, n int64) {
	if e&flagCompressed != 0 {
		off, length := e.compressed(g)
		first = off >> g.clusterBits
		return first, (off+length-1)>>g.clusterBits - first + 1
	}
	if off := e.offset(); off != 0 {
		return off >> g.clusterBits, 1
	}
	return 0, 0
}

// table is an L2 table, or a part of one, as it is on disk: big-endian entries.
type table []byte

func (t table) len() int64             { return int64(len(t)) / 8 }
func (t table) entry(i int64) l2Entry  { return l2Entry(binary.BigEndian.Uint64(t[i*8:])) }
func (t table) set(i int64, e l2Entry) { binary.BigEndian.PutUint64(t[i*8:], uint64(e)) }

// decodeL1 and encodeL1 convert between an L1 table's bytes and its entries.
func decodeL1(b []byte) []l1Entry {
	l1 := make([]l1Entry, len(b)/8)
	for i := range l1 {
		l1[i] = l1Entry(binary.BigEndian.Uint64(b[i*8:]))
	}
	return l1
}

func encodeL1(l1 []l1Entry) []byte {
	b := make([]byte, len(l1)*8)
	for i, e := range l1 {
		binary.BigEndian.PutUint64(b[i*8:], uint64(e))
	}
	return b
}

// run is a range of host clusters.
type run struct{ first, n int64 }

func (r run) end() int64 { return r.first + r.n }

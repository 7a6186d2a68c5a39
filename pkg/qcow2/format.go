package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Limits of the format and of its implementations: QEMU refuses what is larger, so do we.
const (
	minClusterBits         = 9
	minExtendedClusterBits = 14
	maxClusterBits         = 21

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
	flagZero       = 1 << 0 // not with extended L2 entries

	// offsetMask selects bits 9-55, the host offset in L1 and standard L2 entries.
	offsetMask = 0x00fffffffffffe00
	// maxHostOffset bounds every host offset: what bits 9-55 can hold.
	maxHostOffset = 1 << 56

	l1Reserved       = 0x7f000000000001ff
	l2Reserved       = 0x3f000000000001fe
	refTableReserved = 0x1ff
)

// geometry is what follows from an image's cluster size, refcount width and kind of L2 entries.
type geometry struct {
	clusterBits   uint
	clusterSize   int64
	extended      bool  // L2 entries of 16 bytes, with a bitmap of 32 subclusters
	subSize       int64 // bytes of a subcluster: the unit in which a cluster holds data; clusterSize if not extended
	l2Bits        uint  // log2 of the entries in an L2 table
	l2Entries     int64 // entries in an L2 table, which fills one cluster
	l2Coverage    int64 // guest bytes under one L2 table
	refcountOrder uint  // log2 of the bits of a refcount
	blockBits     uint  // log2 of the counts in a refcount block
	blockCounts   int64 // counts in a refcount block, which fills one cluster
}

// newGeometry takes checked cluster bits (9..21, from 14 on if extended) and refcount order (0..6).
func newGeometry(clusterBits, refcountOrder uint, extended bool) geometry {
	g := geometry{
		clusterBits:   clusterBits,
		clusterSize:   1 << clusterBits,
		extended:      extended,
		subSize:       1 << clusterBits,
		l2Bits:        clusterBits - 3,
		refcountOrder: refcountOrder,
		blockBits:     clusterBits + 3 - refcountOrder,
		blockCounts:   1 << (clusterBits + 3 - refcountOrder),
	}
	if extended {
		g.subSize /= subclusters
		g.l2Bits--
	}
	g.l2Entries = 1 << g.l2Bits
	g.l2Coverage = g.l2Entries << clusterBits
	return g
}

// clusters returns how many clusters n bytes need.
func (g geometry) clusters(n int64) int64 { return n>>g.clusterBits + min(g.inCluster(n), 1) }

// aligned tells whether a host or guest offset is the first byte of a cluster.
func (g geometry) aligned(off int64) bool { return off&(g.clusterSize-1) == 0 }

// inCluster is the part of off below the cluster size.
func (g geometry) inCluster(off int64) int64 { return off & (g.clusterSize - 1) }

// l1Entries returns the L1 size that a disk of size bytes needs.
func (g geometry) l1Entries(size int64) int64 {
	n := size / g.l2Coverage
	if size%g.l2Coverage != 0 {
		n++ // not size+l2Coverage-1 above: that may exceed an int64
	}
	return n
}

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

func (r run) has(c int64) bool { return c >= r.first && c < r.end() }

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// l2Entry maps one guest cluster (specification: "Cluster mapping"). A standard entry is treated like an extended one
// whose subclusters are all alike, so that only decode and encode know the difference.
type l2Entry struct {
	// desc is the descriptor: bits 9-55 host offset, bit 62 compressed, bit 63 COPIED. A compressed one has a
	// layout of its own, see compressed. The zero flag of a standard entry is in sub instead.
	desc uint64
	sub  subBitmap
}

// subclusters is how many parts a cluster has for an extended L2 entry.
const subclusters = 32

// subBitmap says what each subcluster is: bits 0-31 allocated, it reads from the host cluster; bits 32-63 zero, it
// reads as zeros, as one with neither does, for there is no backing file.
type subBitmap uint64

const (
	subAllocated subBitmap = 1<<subclusters - 1
	subZero      subBitmap = subAllocated << subclusters
)

// subMask selects the allocated bits of the subclusters that the bytes [from, to) of a cluster touch.
func (g geometry) subMask(from, to int64) subBitmap {
	if !g.extended {
		return subAllocated
	}
	first, last := from/g.subSize, (to-1)/g.subSize
	return subBitmap(1)<<(last+1) - subBitmap(1)<<first
}

// with marks subclusters as allocated.
func (b subBitmap) with(mask subBitmap) subBitmap { return (b | mask) &^ (mask << subclusters) }

// clusterKind is the state of a guest cluster.
type clusterKind uint8

const (
	kindUnallocated clusterKind = iota // reads as zeros
	kindZero                           // reads as zeros; no host cluster
	kindZeroAlloc                      // reads as zeros; the host cluster is kept
	kindData
	kindMixed // some subclusters hold data, the others read as zeros
	kindCompressed
)

func (k clusterKind) readsZero() bool { return k <= kindZeroAlloc }

// kind tests bit 62 first: a compressed entry's other bits mean something else.
func (e l2Entry) kind() clusterKind {
	switch allocated := e.sub & subAllocated; {
	case e.desc&flagCompressed != 0:
		return kindCompressed
	case allocated == subAllocated:
		return kindData
	case allocated != 0:
		return kindMixed
	case e.offset() != 0:
		return kindZeroAlloc
	case e.sub != 0:
		return kindZero
	}
	return kindUnallocated
}

// offset is the host cluster of an entry that is not compressed, 0 if it has none.
func (e l2Entry) offset() int64 { return int64(e.desc & offsetMask) }
func (e l2Entry) copied() bool  { return e.desc&flagCopied != 0 }

// own tells that the active state alone holds the host cluster and may write it in place.
func (e l2Entry) own() bool {
	return e.desc&(flagCopied|flagCompressed) == flagCopied && e.offset() != 0
}

// ownEntry maps to a host cluster of its own.
func ownEntry(host int64, sub subBitmap) l2Entry { return l2Entry{uint64(host) | flagCopied, sub} }

// withCopied returns e with the flag set or cleared.
func (e l2Entry) withCopied(copied bool) l2Entry {
	e.desc &^= flagCopied
	if copied {
		e.desc |= flagCopied
	}
	return e
}

// compressed returns where the compressed bytes lie. The length is rounded up to sectors: the
// stream may end earlier.
func (e l2Entry) compressed(g geometry) (off, length int64) {
	x := 62 - (g.clusterBits - 8)
	off = int64(e.desc & (1<<x - 1))
	sectors := int64(e.desc & (flagCompressed - 1) >> x)
	return off, (sectors+1)*sectorSize - off&(sectorSize-1)
}

// withCompressed returns the compressed entry e with the bytes at off.
func (e l2Entry) withCompressed(g geometry, off int64) l2Entry {
	x := 62 - (g.clusterBits - 8)
	e.desc = e.desc&^(1<<x-1) | uint64(off)
	return e
}

// check refuses an entry that no legal image holds.
func (e l2Entry) check(g geometry, version int) error {
	switch allocated, zero := e.sub&subAllocated, e.sub>>subclusters; {
	case e.desc&flagCompressed != 0:
		if e.copied() || e.sub != 0 {
			return fmt.Errorf("%w: compressed L2 entry %#x has COPIED or subclusters set", ErrCorrupt, e.desc)
		}
		return nil
	case e.desc&(l2Reserved|flagZero) != 0:
		return fmt.Errorf("%w: reserved bits set in L2 entry %#x", ErrCorrupt, e.desc)
	case e.sub&subZero != 0 && version < 3:
		return fmt.Errorf("%w: zero flag in L2 entry %#x of a version 2 image", ErrCorrupt, e.desc)
	case !g.aligned(e.offset()):
		return fmt.Errorf("%w: data cluster offset %#x is not aligned", ErrCorrupt, e.offset())
	case allocated&zero != 0:
		return fmt.Errorf("%w: subclusters of L2 entry %#x are allocated and zero at once: %#x", ErrCorrupt, e.desc, uint64(e.sub))
	case allocated != 0 && e.offset() == 0:
		return fmt.Errorf("%w: L2 entry %#x has allocated subclusters, %#x, and no host cluster", ErrCorrupt, e.desc, uint64(e.sub))
	}
	return nil
}

// reference is what the entry points at, for either kind: entries that differ in it hold different references.
func (e l2Entry) reference() uint64 {
	if e.desc&flagCompressed != 0 {
		return e.desc
	}
	return e.desc & offsetMask
}

// hostClusters returns the host clusters that an entry references: one, none, or for a
// compressed entry each that its bytes touch.
func (e l2Entry) hostClusters(g geometry) (first, n int64) {
	if e.desc&flagCompressed != 0 {
		off, length := e.compressed(g)
		first = off >> g.clusterBits
		return first, (off+length-1)>>g.clusterBits - first + 1
	}
	if off := e.offset(); off != 0 {
		return off >> g.clusterBits, 1
	}
	return 0, 0
}

// subRun returns how many bytes from in bytes into the cluster on are alike: allocated, or not.
func (e l2Entry) subRun(g geometry, in int64) (n int64, allocated bool) {
	k := in / g.subSize
	b := uint32(e.sub) >> k
	if allocated = b&1 != 0; allocated {
		b = ^b
	}
	k += int64(min(bits.TrailingZeros32(b), subclusters))
	return min(k*g.subSize, g.clusterSize) - in, allocated
}

// table is an L2 table, or a part of one, as it is on disk: big-endian entries.
type table struct {
	b        []byte
	extended bool
}

func (g geometry) newTable() table { return g.table(make([]byte, g.clusterSize)) }

func (g geometry) table(b []byte) table { return table{b, g.extended} }

// len returns the number of entries.
func (t table) len() int64 { return int64(len(t.b)) / t.entrySize() }

func (t table) entrySize() int64 {
	if t.extended {
		return 16
	}
	return 8
}

// l2EntrySize is table.entrySize.
func (g geometry) l2EntrySize() int64 { return table{extended: g.extended}.entrySize() }

func (t table) entry(i int64) l2Entry {
	if t.extended {
		return l2Entry{binary.BigEndian.Uint64(t.b[i*16:]), subBitmap(binary.BigEndian.Uint64(t.b[i*16+8:]))}
	}
	switch raw := binary.BigEndian.Uint64(t.b[i*8:]); {
	case raw&flagCompressed != 0:
		return l2Entry{raw, 0}
	case raw&flagZero != 0:
		return l2Entry{raw &^ flagZero, subZero}
	case raw&offsetMask != 0:
		return l2Entry{raw, subAllocated}
	default:
		return l2Entry{raw, 0}
	}
}

func (t table) set(i int64, e l2Entry) {
	if t.extended {
		binary.BigEndian.PutUint64(t.b[i*16:], e.desc)
		binary.BigEndian.PutUint64(t.b[i*16+8:], uint64(e.sub))
		return
	}
	if e.sub&subZero != 0 {
		e.desc |= flagZero
	}
	binary.BigEndian.PutUint64(t.b[i*8:], e.desc)
}

// next is the n-th entry after e of a run.
func (e l2Entry) next(g geometry, n int) l2Entry {
	if e.desc&flagCompressed == 0 && e.offset() != 0 {
		e.desc += uint64(n) << g.clusterBits
	}
	return e
}

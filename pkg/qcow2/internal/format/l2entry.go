package format

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// L2Entry maps one guest cluster (specification: "Cluster mapping"). A standard entry is treated like an extended one
// whose subclusters are all alike, so that only decode and encode know the difference.
type L2Entry struct {
	// Desc is the descriptor: bits 9-55 host offset, bit 62 compressed, bit 63 COPIED. A compressed one has a
	// layout of its own, see Compressed. The zero flag of a standard entry is in Sub instead.
	Desc uint64
	Sub  SubBitmap
}

// Subclusters is how many parts a cluster has for an extended L2 entry.
const Subclusters = 32

// SubBitmap says what each subcluster is: bits 0-31 allocated, it reads from the host cluster; bits 32-63 zero, it
// reads as zeros, as one with neither does, for there is no backing file.
type SubBitmap uint64

// The subclusters of a standard entry.
const (
	SubAllocated SubBitmap = 1<<Subclusters - 1
	SubZero      SubBitmap = SubAllocated << Subclusters
)

// SubMask selects the allocated bits of the subclusters that the bytes [from, to) of a cluster touch.
func (g Geometry) SubMask(from, to int64) SubBitmap {
	if !g.Extended {
		return SubAllocated
	}
	first, last := from/g.SubSize, (to-1)/g.SubSize
	return SubBitmap(1)<<(last+1) - SubBitmap(1)<<first
}

// With marks subclusters as allocated.
func (b SubBitmap) With(mask SubBitmap) SubBitmap { return (b | mask) &^ (mask << Subclusters) }

// ClusterKind is the state of a guest cluster.
type ClusterKind uint8

// The kinds of clusters.
const (
	KindUnallocated ClusterKind = iota // reads as zeros
	KindZero                           // reads as zeros; no host cluster
	KindZeroAlloc                      // reads as zeros; the host cluster is kept
	KindData
	KindMixed // some subclusters hold data, the others read as zeros
	KindCompressed
)

// ReadsZero tells whether a cluster of that kind reads as zeros. Of one of KindMixed a part may: see SubRun.
func (k ClusterKind) ReadsZero() bool { return k <= KindZeroAlloc }

// Kind tests bit 62 first: a compressed entry's other bits mean something else.
func (e L2Entry) Kind() ClusterKind {
	switch allocated := e.Sub & SubAllocated; {
	case e.Desc&FlagCompressed != 0:
		return KindCompressed
	case allocated == SubAllocated:
		return KindData
	case allocated != 0:
		return KindMixed
	case e.Offset() != 0:
		return KindZeroAlloc
	case e.Sub != 0:
		return KindZero
	}
	return KindUnallocated
}

// Offset is the host cluster of an entry that is not compressed, 0 if it has none.
func (e L2Entry) Offset() HostOffset { return HostOffset(e.Desc & OffsetMask) }

// Copied tells whether COPIED is set.
func (e L2Entry) Copied() bool { return e.Desc&FlagCopied != 0 }

// Own tells that the active state alone holds the host cluster and may write it in place.
func (e L2Entry) Own() bool {
	return e.Desc&(FlagCopied|FlagCompressed) == FlagCopied && e.Offset() != 0
}

// OwnEntry maps to a host cluster of its own.
func OwnEntry(host HostOffset, sub SubBitmap) L2Entry { return L2Entry{uint64(host) | FlagCopied, sub} }

// WithCopied returns e with the flag set or cleared.
func (e L2Entry) WithCopied(copied bool) L2Entry {
	e.Desc &^= FlagCopied
	if copied {
		e.Desc |= FlagCopied
	}
	return e
}

// Compressed returns where the compressed bytes lie. The length is rounded up to sectors: the
// stream may end earlier.
func (e L2Entry) Compressed(g Geometry) (off HostOffset, length int64) {
	x := 62 - (g.ClusterBits - 8)
	off = HostOffset(e.Desc & (1<<x - 1))
	sectors := int64(e.Desc & (FlagCompressed - 1) >> x)
	return off, (sectors+1)*SectorSize - int64(off)&(SectorSize-1)
}

// WithCompressed returns the compressed entry e with the bytes at off.
func (e L2Entry) WithCompressed(g Geometry, off HostOffset) L2Entry {
	x := 62 - (g.ClusterBits - 8)
	e.Desc = e.Desc&^(1<<x-1) | uint64(off)
	return e
}

// Check refuses an entry that no legal image holds.
func (e L2Entry) Check(g Geometry, version int) error {
	switch allocated, zero := e.Sub&SubAllocated, e.Sub>>Subclusters; {
	case e.Desc&FlagCompressed != 0:
		if e.Copied() || e.Sub != 0 {
			return fmt.Errorf("%w: compressed L2 entry %#x has COPIED or subclusters set", ErrCorrupt, e.Desc)
		}
		return nil
	case e.Desc&(L2Reserved|FlagZero) != 0:
		return fmt.Errorf("%w: reserved bits set in L2 entry %#x", ErrCorrupt, e.Desc)
	case e.Sub&SubZero != 0 && version < 3:
		return fmt.Errorf("%w: zero flag in L2 entry %#x of a version 2 image", ErrCorrupt, e.Desc)
	case !g.Aligned(e.Offset()):
		return fmt.Errorf("%w: data cluster offset %#x is not aligned", ErrCorrupt, e.Offset())
	case allocated&zero != 0:
		return fmt.Errorf("%w: subclusters of L2 entry %#x are allocated and zero at once: %#x", ErrCorrupt, e.Desc, uint64(e.Sub))
	case allocated != 0 && e.Offset() == 0:
		return fmt.Errorf("%w: L2 entry %#x has allocated subclusters, %#x, and no host cluster", ErrCorrupt, e.Desc, uint64(e.Sub))
	}
	return nil
}

// Reference is what the entry points at, for either kind: entries that differ in it hold different references.
func (e L2Entry) Reference() uint64 {
	if e.Desc&FlagCompressed != 0 {
		return e.Desc
	}
	return e.Desc & OffsetMask
}

// HostClusters returns the host clusters that an entry references: one, none, or for a
// compressed entry each that its bytes touch.
func (e L2Entry) HostClusters(g Geometry) Run {
	if e.Desc&FlagCompressed != 0 {
		return g.RunOf(e.Compressed(g))
	}
	if off := e.Offset(); off != 0 {
		return g.Cluster(off).Alone()
	}
	return Run{}
}

// SubRun returns how many bytes from in bytes into the cluster on are alike: allocated, or not.
func (e L2Entry) SubRun(g Geometry, in int64) (n int64, allocated bool) {
	k := in / g.SubSize
	b := uint32(e.Sub) >> k
	if allocated = b&1 != 0; allocated {
		b = ^b
	}
	k += int64(min(bits.TrailingZeros32(b), Subclusters))
	return min(k*g.SubSize, g.ClusterSize) - in, allocated
}

// L2Table is an L2 table, or a part of one, as it is on disk: big-endian entries.
type L2Table struct {
	B        []byte
	Extended bool
}

// NewTable returns an L2 table of zeros.
func (g Geometry) NewTable() L2Table { return g.Table(make([]byte, g.ClusterSize)) }

// Table returns the L2 table that b holds, which stays the caller's.
func (g Geometry) Table(b []byte) L2Table { return L2Table{b, g.Extended} }

// Len returns the number of entries.
func (t L2Table) Len() int64 { return int64(len(t.B)) / t.EntrySize() }

// EntrySize returns the bytes of an entry.
func (t L2Table) EntrySize() int64 {
	if t.Extended {
		return 16
	}
	return 8
}

// L2EntrySize is L2Table.EntrySize.
func (g Geometry) L2EntrySize() int64 { return L2Table{Extended: g.Extended}.EntrySize() }

// Entry decodes entry i.
func (t L2Table) Entry(i int64) L2Entry {
	if t.Extended {
		return L2Entry{binary.BigEndian.Uint64(t.B[i*16:]), SubBitmap(binary.BigEndian.Uint64(t.B[i*16+8:]))}
	}
	switch raw := binary.BigEndian.Uint64(t.B[i*8:]); {
	case raw&FlagCompressed != 0:
		return L2Entry{raw, 0}
	case raw&FlagZero != 0:
		return L2Entry{raw &^ FlagZero, SubZero}
	case raw&OffsetMask != 0:
		return L2Entry{raw, SubAllocated}
	default:
		return L2Entry{raw, 0}
	}
}

// Set replaces entry i.
func (t L2Table) Set(i int64, e L2Entry) {
	if t.Extended {
		binary.BigEndian.PutUint64(t.B[i*16:], e.Desc)
		binary.BigEndian.PutUint64(t.B[i*16+8:], uint64(e.Sub))
		return
	}
	if e.Sub&SubZero != 0 {
		e.Desc |= FlagZero
	}
	binary.BigEndian.PutUint64(t.B[i*8:], e.Desc)
}

// Next is the n-th entry after e of a run.
func (e L2Entry) Next(g Geometry, n int) L2Entry {
	if e.Desc&FlagCompressed == 0 && e.Offset() != 0 {
		e.Desc += uint64(g.Bytes(int64(n)))
	}
	return e
}

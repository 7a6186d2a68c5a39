package format

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// RoundToSectors rounds a disk's size up, as QEMU does: it cannot serve a part of a sector.
func RoundToSectors(size int64) int64 {
	if size > math.MaxInt64-SectorSize {
		return size // too large in any case
	}
	return (size + SectorSize - 1) &^ (SectorSize - 1)
}

// OnlyZeros tells whether all of a sector is zeros.
func OnlyZeros(sector []byte) bool {
	for ; len(sector) >= 8; sector = sector[8:] {
		if binary.NativeEndian.Uint64(sector) != 0 {
			return false
		}
	}
	return true
}

// LeadingZeros returns with how many zeros b begins, in whole sectors.
func LeadingZeros(b []byte) int64 {
	n := int64(0)
	for ; n+SectorSize <= int64(len(b)) && OnlyZeros(b[n:n+SectorSize]); n += SectorSize {
	}
	return n
}

// Nonzero returns where the zeros begin that b ends with, in whole sectors.
func Nonzero(b []byte) int64 {
	n := int64(len(b))
	for ; n >= SectorSize && OnlyZeros(b[n-SectorSize:n]); n -= SectorSize {
	}
	return n
}

// SectorSet is a set of the sectors of a table.
type SectorSet []uint64

// Add adds sector i.
func (s *SectorSet) Add(i int64) {
	for int64(len(*s)) <= i/64 {
		*s = append(*s, 0)
	}
	(*s)[i/64] |= 1 << (i % 64)
}

// AddRange adds the sectors that bytes [from, to) touch.
func (s *SectorSet) AddRange(from, to int64) {
	for i := from / SectorSize; i*SectorSize < to; i++ {
		s.Add(i)
	}
}

// AllSectors is the set of all sectors of a table.
func (g Geometry) AllSectors() SectorSet {
	var s SectorSet
	s.AddRange(0, g.ClusterSize)
	return s
}

// AddAll adds all of o.
func (s *SectorSet) AddAll(o SectorSet) {
	for w, b := range o {
		for ; b != 0; b &= b - 1 {
			s.Add(int64(w*64 + bits.TrailingZeros64(b)))
		}
	}
}

func (s SectorSet) has(i int64) bool {
	return i/64 < int64(len(s)) && s[i/64]&(1<<(i%64)) != 0
}

// Empty tells whether there is no sector in the set.
func (s SectorSet) Empty() bool {
	for _, b := range s {
		if b != 0 {
			return false
		}
	}
	return true
}

// Each calls fn for each maximal run of neighbours in the set.
func (s SectorSet) Each(fn func(first, n int64)) {
	end := int64(len(s)) * 64
	for i := int64(0); i < end; {
		if !s.has(i) {
			i++
			continue
		}
		first := i
		for i < end && s.has(i) {
			i++
		}
		fn(first, i-first)
	}
}

// Parts returns copies of the sectors in the set of b, which lies at off.
func (s SectorSet) Parts(b []byte, off HostOffset) []MetaWrite {
	var ps []MetaWrite
	s.Each(func(first, n int64) {
		at, end := first*SectorSize, min((first+n)*SectorSize, int64(len(b)))
		ps = append(ps, MetaWrite{off.Plus(at), append([]byte(nil), b[at:end]...)})
	})
	return ps
}

// MetaWrite is a part of the metadata on its way to the disk.
type MetaWrite struct {
	Off HostOffset
	B   []byte // a copy
}

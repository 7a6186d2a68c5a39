package qcow2

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// roundToSectors rounds a disk's size up, as QEMU does: it cannot serve a part of a sector.
func roundToSectors(size int64) int64 {
	if size > math.MaxInt64-sectorSize {
		return size // too large in any case
	}
	return (size + sectorSize - 1) &^ (sectorSize - 1)
}

// onlyZeros tells whether all of a sector is zeros.
func onlyZeros(sector []byte) bool {
	for ; len(sector) >= 8; sector = sector[8:] {
		if binary.NativeEndian.Uint64(sector) != 0 {
			return false
		}
	}
	return true
}

// leadingZeros returns with how many zeros b begins, in whole sectors.
func leadingZeros(b []byte) int64 {
	n := int64(0)
	for ; n+sectorSize <= int64(len(b)) && onlyZeros(b[n:n+sectorSize]); n += sectorSize {
	}
	return n
}

// nonzero returns where the zeros begin that b ends with, in whole sectors.
func nonzero(b []byte) int64 {
	n := int64(len(b))
	for ; n >= sectorSize && onlyZeros(b[n-sectorSize:n]); n -= sectorSize {
	}
	return n
}

// sectorSet is a set of the sectors of a table.
type sectorSet []uint64

func (s *sectorSet) add(i int64) {
	for int64(len(*s)) <= i/64 {
		*s = append(*s, 0)
	}
	(*s)[i/64] |= 1 << (i % 64)
}

// addRange adds the sectors that bytes [from, to) touch.
func (s *sectorSet) addRange(from, to int64) {
	for i := from / sectorSize; i*sectorSize < to; i++ {
		s.add(i)
	}
}

// allSectors is the set of all sectors of a table.
func (g geometry) allSectors() sectorSet {
	var s sectorSet
	s.addRange(0, g.clusterSize)
	return s
}

func (s *sectorSet) addAll(o sectorSet) {
	for w, b := range o {
		for ; b != 0; b &= b - 1 {
			s.add(int64(w*64 + bits.TrailingZeros64(b)))
		}
	}
}

func (s sectorSet) has(i int64) bool {
	return i/64 < int64(len(s)) && s[i/64]&(1<<(i%64)) != 0
}

func (s sectorSet) empty() bool {
	for _, b := range s {
		if b != 0 {
			return false
		}
	}
	return true
}

// each calls fn for each maximal run of neighbours in the set.
func (s sectorSet) each(fn func(first, n int64)) {
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

// parts returns copies of the sectors in the set of b, which lies at off.
func (s sectorSet) parts(b []byte, off int64) []metaWrite {
	var ps []metaWrite
	s.each(func(first, n int64) {
		at, end := first*sectorSize, min((first+n)*sectorSize, int64(len(b)))
		ps = append(ps, metaWrite{off + at, append([]byte(nil), b[at:end]...)})
	})
	return ps
}

// metaWrite is a part of the metadata on its way to the disk.
type metaWrite struct {
	off int64
	b   []byte // a copy
}

package format

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"slices"
)

// Counts is a refcount block in memory, or several that follow each other, as it is on disk: counts of 1 << order
// bits, big-endian, those of less than a byte from the least significant bit on (specification: "Host cluster
// management"). The zero value is no block.
type Counts struct {
	B     []byte
	Order uint
}

// NewCounts returns so many refcount blocks of zeros.
func (g Geometry) NewCounts(blocks int64) Counts {
	return Counts{make([]byte, g.Bytes(blocks)), g.RefcountOrder}
}

// None tells that there is no block.
func (c Counts) None() bool { return c.B == nil }

// Len returns how many counts there are.
func (c Counts) Len() int64 { return int64(len(c.B)) << 3 >> c.Order }

// Max returns the largest count.
func (c Counts) Max() uint64 { return 1<<(1<<c.Order) - 1 }

// Get returns count i.
func (c Counts) Get(i int64) uint64 {
	switch c.Order {
	case 3:
		return uint64(c.B[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(c.B[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(c.B[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(c.B[i*8:])
	}
	at, shift := c.bits(i)
	return uint64(c.B[at]>>shift) & c.Max()
}

// Set sets count i to v, which must fit.
func (c Counts) Set(i int64, v uint64) {
	switch c.Order {
	case 3:
		c.B[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(c.B[i*2:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(c.B[i*4:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(c.B[i*8:], v)
	default:
		at, shift := c.bits(i)
		c.B[at] = c.B[at]&^byte(c.Max()<<shift) | byte(v<<shift)
	}
}

// Fill sets n counts from index i on.
func (c Counts) Fill(i, n int64, v uint64) {
	low, _ := c.lanes()
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		c.Set(k, v)
	}
	for p := 0; p+8 <= len(b); p += 8 {
		binary.BigEndian.PutUint64(b[p:], low*v)
	}
	for k := tail; k < i+n; k++ {
		c.Set(k, v)
	}
}

// bits returns the byte that holds a count of less than a byte, and the place of its lowest bit there.
func (c Counts) bits(i int64) (at int64, shift uint) {
	return i << c.Order >> 3, uint(i<<c.Order) & 7
}

// At returns the offset in bytes of count i, or of the byte that holds it.
func (c Counts) At(i int64) int64 { return i << c.Order >> 3 }

// lanes are masks over 8 bytes of counts: the lowest and the highest bit of each count.
func (c Counts) lanes() (low, high uint64) {
	width := uint(1) << c.Order
	low = math.MaxUint64 / (1<<width - 1)
	return low, low << (width - 1)
}

// zeroLanes returns the highest bit of each count of w that is 0.
func zeroLanes(w, high uint64) uint64 { return ^((w&^high + ^high) | w) & high }

// words splits n counts from index i on into those before the first whole word of 8 bytes, the bytes of whole words,
// and those behind.
func (c Counts) words(i, n int64) (head int64, b []byte, tail int64) {
	per := int64(64) >> c.Order
	first, end := (i+per-1)&^(per-1), (i+n)&^(per-1)
	if first >= end {
		return i + n, nil, i + n
	}
	return first, c.B[c.At(first):c.At(end)], end
}

// Fallen tells how low counts fell.
type Fallen struct{ ToZero, ToOne bool }

// Add changes n counts from index i on by delta, 1 or -1. Nothing is changed if one of them would leave its range:
// ErrLimit above, ErrCorrupt below.
func (c Counts) Add(i, n int64, delta int) (Fallen, error) {
	var fell Fallen
	if k := c.firstAt(i, n, delta); k >= 0 {
		if delta < 0 {
			return fell, fmt.Errorf("%w: refcount of cluster %d of its block would fall below 0", ErrCorrupt, k)
		}
		return fell, fmt.Errorf("%w: refcount of cluster %d of its block would exceed %d; delete a snapshot first, or use an image with wider reference counts", ErrLimit, k, c.Max())
	}
	low, high := c.lanes()
	head, b, tail := c.words(i, n)
	one := func(k int64) {
		v := c.Get(k) + uint64(int64(delta))
		c.Set(k, v)
		fell.ToZero = fell.ToZero || delta < 0 && v == 0
		fell.ToOne = fell.ToOne || delta < 0 && v == 1
	}
	for k := i; k < head; k++ {
		one(k)
	}
	if delta > 0 {
		for p := 0; p+8 <= len(b); p += 8 {
			binary.BigEndian.PutUint64(b[p:], binary.BigEndian.Uint64(b[p:])+low)
		}
	} else {
		var zeros, ones uint64
		for p := 0; p+8 <= len(b); p += 8 {
			w := binary.BigEndian.Uint64(b[p:]) - low
			zeros |= zeroLanes(w, high)
			ones |= zeroLanes(w^low, high)
			binary.BigEndian.PutUint64(b[p:], w)
		}
		fell.ToZero, fell.ToOne = fell.ToZero || zeros != 0, fell.ToOne || ones != 0
	}
	for k := tail; k < i+n; k++ {
		one(k)
	}
	return fell, nil
}

// firstAt returns the first of n counts from index i on that cannot change by delta, or -1.
func (c Counts) firstAt(i, n int64, delta int) int64 {
	end := uint64(0)
	if delta > 0 {
		end = c.Max()
	}
	if k := c.Find(i, n, end); k < i+n {
		return k
	}
	return -1
}

// Find returns the first of n indexes from i on whose count is v, or i+n.
func (c Counts) Find(i, n int64, v uint64) int64 {
	low, high := c.lanes()
	pattern := low * v
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		if c.Get(k) == v {
			return k
		}
	}
	for p := 0; p+8 <= len(b); p += 8 {
		if zeroLanes(binary.BigEndian.Uint64(b[p:])^pattern, high) != 0 {
			tail = head + int64(p)<<3>>c.Order
			break
		}
	}
	for k := tail; k < i+n; k++ {
		if c.Get(k) == v {
			return k
		}
	}
	return i + n
}

// Alike returns the first of n indexes from i on whose count is not v, or i+n.
func (c Counts) Alike(i, n int64, v uint64) int64 {
	low, _ := c.lanes()
	pattern := low * v
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		if c.Get(k) != v {
			return k
		}
	}
	word := func(p int) uint64 { return binary.BigEndian.Uint64(b[p:]) ^ pattern }
	p := 0
	for ; p+32 <= len(b) && word(p)|word(p+8)|word(p+16)|word(p+24) == 0; p += 32 {
	}
	for ; p+8 <= len(b); p += 8 {
		if word(p) != 0 {
			tail = head + int64(p)<<3>>c.Order
			break
		}
	}
	for k := tail; k < i+n; k++ {
		if c.Get(k) != v {
			return k
		}
	}
	return i + n
}

// Zeros returns the first counts of 0 from index i on, at most so many, of n in all. Without counts all are 0.
func (c Counts) Zeros(i, most, n int64) (from, end int64) {
	if c.None() {
		return i, i + min(most, n-i)
	}
	from = c.NextZero(i)
	return from, c.Alike(from, min(most, n-from), 0)
}

// NextZero returns the first index from i on whose count is 0, or the number of counts.
func (c Counts) NextZero(i int64) int64 { return c.Find(i, c.Len()-i, 0) }

// NextNonzero returns the first index from i on whose count is not 0, or the number of counts.
func (c Counts) NextNonzero(i int64) int64 { return c.Alike(i, c.Len()-i, 0) }

// EachBlock splits a run of clusters at the borders of refcount blocks: fn gets the block's index, and the
// first count and the number of counts in it.
func (g Geometry) EachBlock(r Run, fn func(block, i, n int64) error) error {
	for r.N > 0 {
		block, i := g.BlockOf(r.First), g.InBlock(r.First)
		n := min(r.N, g.BlockCounts-i)
		if err := fn(block, i, n); err != nil {
			return err
		}
		r = r.Behind(n)
	}
	return nil
}

// BlocksOf yields the refcount blocks of a run of clusters.
func (g Geometry) BlocksOf(r Run) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for k := g.BlockOf(r.First); k <= g.BlockOf(r.End()-1) && yield(k); k++ {
		}
	}
}

// ByBlocks yields rs in parts, each with the refcount blocks in which it is counted, at most n.
func (g Geometry) ByBlocks(rs Runs, n int) iter.Seq2[Runs, []int64] {
	return func(yield func(Runs, []int64) bool) {
		var part Runs
		var blocks []int64
		for _, r := range rs {
			for k := range g.BlocksOf(r) {
				if !slices.Contains(blocks, k) {
					if len(blocks) == n {
						if !yield(part, blocks) {
							return
						}
						part, blocks = nil, nil
					}
					blocks = append(blocks, k)
				}
				part.Add(RunTo(max(r.First, g.Counted(k, 0)), min(r.End(), g.Counted(k+1, 0))))
			}
		}
		if len(part) > 0 {
			yield(part, blocks)
		}
	}
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"slices"
)

// counts is a refcount block in memory, or several that follow each other, as it is on disk: counts of 1 << order
// bits, big-endian, those of less than a byte from the least significant bit on (specification: "Host cluster
// management"). The zero value is no block.
type counts struct {
	b     []byte
	order uint
}

func (g geometry) newCounts(blocks int64) counts {
	return counts{make([]byte, blocks<<g.clusterBits), g.refcountOrder}
}

func (c counts) none() bool { return c.b == nil }

// len returns how many counts there are.
func (c counts) len() int64 { return int64(len(c.b)) << 3 >> c.order }

// max returns the largest count.
func (c counts) max() uint64 { return 1<<(1<<c.order) - 1 }

func (c counts) get(i int64) uint64 {
	switch c.order {
	case 3:
		return uint64(c.b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(c.b[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(c.b[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(c.b[i*8:])
	}
	at, shift := c.bits(i)
	return uint64(c.b[at]>>shift) & c.max()
}

func (c counts) set(i int64, v uint64) {
	switch c.order {
	case 3:
		c.b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(c.b[i*2:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(c.b[i*4:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(c.b[i*8:], v)
	default:
		at, shift := c.bits(i)
		c.b[at] = c.b[at]&^byte(c.max()<<shift) | byte(v<<shift)
	}
}

// fill sets n counts from index i on.
func (c counts) fill(i, n int64, v uint64) {
	low, _ := c.lanes()
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		c.set(k, v)
	}
	for p := 0; p+8 <= len(b); p += 8 {
		binary.BigEndian.PutUint64(b[p:], low*v)
	}
	for k := tail; k < i+n; k++ {
		c.set(k, v)
	}
}

// bits returns the byte that holds a count of less than a byte, and the place of its lowest bit there.
func (c counts) bits(i int64) (at int64, shift uint) {
	return i << c.order >> 3, uint(i<<c.order) & 7
}

// at returns the offset in bytes of count i, or of the byte that holds it.
func (c counts) at(i int64) int64 { return i << c.order >> 3 }

// lanes are masks over 8 bytes of counts: the lowest and the highest bit of each count.
func (c counts) lanes() (low, high uint64) {
	width := uint(1) << c.order
	low = math.MaxUint64 / (1<<width - 1)
	return low, low << (width - 1)
}

// zeroLanes returns the highest bit of each count of w that is 0.
func zeroLanes(w, high uint64) uint64 { return ^((w&^high + ^high) | w) & high }

// words splits n counts from index i on into those before the first whole word of 8 bytes, the bytes of whole words,
// and those behind.
func (c counts) words(i, n int64) (head int64, b []byte, tail int64) {
	per := int64(64) >> c.order
	first, end := (i+per-1)&^(per-1), (i+n)&^(per-1)
	if first >= end {
		return i + n, nil, i + n
	}
	return first, c.b[c.at(first):c.at(end)], end
}

// fallen tells how low counts fell.
type fallen struct{ to0, to1 bool }

// add changes n counts from index i on by delta, 1 or -1. Nothing is changed if one of them would leave its range:
// ErrLimit above, ErrCorrupt below.
func (c counts) add(i, n int64, delta int) (fallen, error) {
	var fell fallen
	if k := c.firstAt(i, n, delta); k >= 0 {
		if delta < 0 {
			return fell, fmt.Errorf("%w: refcount of cluster %d of its block would fall below 0", ErrCorrupt, k)
		}
		return fell, fmt.Errorf("%w: refcount of cluster %d of its block would exceed %d; delete a snapshot first, or use an image with wider reference counts", ErrLimit, k, c.max())
	}
	low, high := c.lanes()
	head, b, tail := c.words(i, n)
	one := func(k int64) {
		v := c.get(k) + uint64(int64(delta))
		c.set(k, v)
		fell.to0 = fell.to0 || delta < 0 && v == 0
		fell.to1 = fell.to1 || delta < 0 && v == 1
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
		fell.to0, fell.to1 = fell.to0 || zeros != 0, fell.to1 || ones != 0
	}
	for k := tail; k < i+n; k++ {
		one(k)
	}
	return fell, nil
}

// firstAt returns the first of n counts from index i on that cannot change by delta, or -1.
func (c counts) firstAt(i, n int64, delta int) int64 {
	end := uint64(0)
	if delta > 0 {
		end = c.max()
	}
	if k := c.find(i, n, end); k < i+n {
		return k
	}
	return -1
}

// find returns the first of n indexes from i on whose count is v, or i+n.
func (c counts) find(i, n int64, v uint64) int64 {
	low, high := c.lanes()
	pattern := low * v
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		if c.get(k) == v {
			return k
		}
	}
	for p := 0; p+8 <= len(b); p += 8 {
		if zeroLanes(binary.BigEndian.Uint64(b[p:])^pattern, high) != 0 {
			tail = head + int64(p)<<3>>c.order
			break
		}
	}
	for k := tail; k < i+n; k++ {
		if c.get(k) == v {
			return k
		}
	}
	return i + n
}

// alike returns the first of n indexes from i on whose count is not v, or i+n.
func (c counts) alike(i, n int64, v uint64) int64 {
	low, _ := c.lanes()
	pattern := low * v
	head, b, tail := c.words(i, n)
	for k := i; k < head; k++ {
		if c.get(k) != v {
			return k
		}
	}
	word := func(p int) uint64 { return binary.BigEndian.Uint64(b[p:]) ^ pattern }
	p := 0
	for ; p+32 <= len(b) && word(p)|word(p+8)|word(p+16)|word(p+24) == 0; p += 32 {
	}
	for ; p+8 <= len(b); p += 8 {
		if word(p) != 0 {
			tail = head + int64(p)<<3>>c.order
			break
		}
	}
	for k := tail; k < i+n; k++ {
		if c.get(k) != v {
			return k
		}
	}
	return i + n
}

// zeros returns the first counts of 0 from index i on, at most so many, of n in all. Without counts all are 0.
func (c counts) zeros(i, most, n int64) (from, end int64) {
	if c.none() {
		return i, i + min(most, n-i)
	}
	from = c.nextZero(i)
	return from, c.alike(from, min(most, n-from), 0)
}

// nextZero returns the first index from i on whose count is 0, or the number of counts.
func (c counts) nextZero(i int64) int64 { return c.find(i, c.len()-i, 0) }

// nextNonzero returns the first index from i on whose count is not 0, or the number of counts.
func (c counts) nextNonzero(i int64) int64 { return c.alike(i, c.len()-i, 0) }

// eachBlock splits a run of clusters at the borders of refcount blocks: fn gets the block's index, and the
// first count and the number of counts in it.
func (g geometry) eachBlock(r run, fn func(block, i, n int64) error) error {
	for r.n > 0 {
		block, i := r.first>>g.blockBits, r.first&(g.blockCounts-1)
		n := min(r.n, g.blockCounts-i)
		if err := fn(block, i, n); err != nil {
			return err
		}
		r = run{r.first + n, r.n - n}
	}
	return nil
}

// blocksOf yields the refcount blocks of a run of clusters.
func (g geometry) blocksOf(r run) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for k := r.first >> g.blockBits; k <= (r.end()-1)>>g.blockBits && yield(k); k++ {
		}
	}
}

// byBlocks yields rs in parts, each with the refcount blocks in which it is counted, at most n.
func (g geometry) byBlocks(rs runs, n int) iter.Seq2[runs, []int64] {
	return func(yield func(runs, []int64) bool) {
		var part runs
		var blocks []int64
		for _, r := range rs {
			for k := range g.blocksOf(r) {
				if !slices.Contains(blocks, k) {
					if len(blocks) == n {
						if !yield(part, blocks) {
							return
						}
						part, blocks = nil, nil
					}
					blocks = append(blocks, k)
				}
				first := max(r.first, k<<g.blockBits)
				part.add(run{first, min(r.end(), (k+1)<<g.blockBits) - first})
			}
		}
		if len(part) > 0 {
			yield(part, blocks)
		}
	}
}

// runs gathers host clusters into maximal runs of neighbours, in the order in which they come.
type runs []run

func (rs *runs) add(r run) {
	if r.n == 0 {
		return
	}
	if k := len(*rs); k > 0 && (*rs)[k-1].end() == r.first {
		(*rs)[k-1].n += r.n
		return
	}
	*rs = append(*rs, r)
}

// clusters returns how many there are in all.
func (rs runs) clusters() int64 {
	var n int64
	for _, r := range rs {
		n += r.n
	}
	return n
}

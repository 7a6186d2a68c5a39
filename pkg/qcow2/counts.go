package qcow2

import (
	"encoding/binary"
	"fmt"
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

// bits returns the byte that holds a count of less than a byte, and the place of its lowest bit there.
func (c counts) bits(i int64) (at int64, shift uint) {
	return i << c.order >> 3, uint(i<<c.order) & 7
}

// at returns the offset in bytes of count i, or of the byte that holds it.
func (c counts) at(i int64) int64 { return i << c.order >> 3 }

// add changes n counts from index i on by delta, 1 or -1. Nothing is changed if one of them would leave its range:
// ErrLimit above, ErrCorrupt below.
func (c counts) add(i, n int64, delta int) error {
	for k := i; k < i+n; k++ {
		switch v := c.get(k); {
		case delta < 0 && v == 0:
			return fmt.Errorf("%w: refcount of cluster %d of its block would fall below 0", ErrCorrupt, k)
		case delta > 0 && v == c.max():
			return fmt.Errorf("%w: refcount of cluster %d of its block would exceed %d", ErrLimit, k, c.max())
		}
	}
	for k := i; k < i+n; k++ {
		c.set(k, c.get(k)+uint64(int64(delta)))
	}
	return nil
}

// nextZero returns the first index from i on whose count is 0, or the number of counts.
func (c counts) nextZero(i int64) int64 {
	for n := c.len(); i < n && c.get(i) != 0; {
		i++
	}
	return min(i, c.len())
}

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

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
)

// counts is a refcount block in memory as it is on disk: big-endian 16-bit counts (specification:
// "Host cluster management").
type counts []byte

func (c counts) get(i int64) uint16    { return binary.BigEndian.Uint16(c[i*2:]) }
func (c counts) set(i int64, v uint16) { binary.BigEndian.PutUint16(c[i*2:], v) }

// add changes n counts from index i on by delta. Nothing is changed if one of them would leave its range.
func (c counts) add(i, n int64, delta int) error {
	for k := i; k < i+n; k++ {
		switch v := int(c.get(k)) + delta; {
		case v < 0:
			return fmt.Errorf("%w: refcount of cluster %d of its block would fall below 0", ErrCorrupt, k)
		case v > math.MaxUint16:
			return fmt.Errorf("%w: refcount of cluster %d of its block would exceed %d", ErrLimit, k, math.MaxUint16)
		}
	}
	for k := i; k < i+n; k++ {
		c.set(k, uint16(int(c.get(k))+delta))
	}
	return nil
}

// nextZero returns the first index from i on whose count is 0, or the number of counts.
func (c counts) nextZero(i int64) int64 {
	n := int64(len(c)) / 2
	for i < n && c.get(i) != 0 {
		i++
	}
	return i
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

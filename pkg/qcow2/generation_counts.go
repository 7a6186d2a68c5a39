package qcow2

import (
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// shadowBlock is a refcount block of the next generation: live counts, plus what the operation changes. One that has no
// place yet and has not changed is only a copy of the live one.
type shadowBlock struct {
	refBlock                   // without counts if it was written and put out of memory
	at       format.HostOffset // 0 as long as it has none
	old      format.HostOffset // of the live block whose count has been taken away for it, 0 if there was none
}

// clean tells that the block is no more than a copy of the live one.
func (b *shadowBlock) clean() bool { return b.at == 0 && b.dirty.Empty() }

// shadowBytes bounds the refcount blocks that an operation keeps in memory.
const shadowBytes = 64 << 20

// limit is shadowBytes in blocks.
func (n *generation) limit() int { return int(max(shadowBytes/n.g.ClusterSize, 64)) }

// forget drops a clean block. Called with the allocator's lock held, as the rest.
func (n *generation) forget(k int64) {
	if c := n.blocks[k].counts; !c.None() {
		n.spare = append(n.spare, c)
	}
	delete(n.blocks, k)
}

// The following are called with the allocator's lock held, unless they say otherwise.

// block returns block i, without counts if all are 0 and the live generation has none.
func (n *generation) block(i int64) (*shadowBlock, error) {
	b := n.blocks[i]
	if b != nil && !b.counts.None() {
		return b, nil
	}
	off, live := n.source(i)
	switch {
	case b == nil && live == nil && off == 0:
		return &shadowBlock{}, nil
	case b == nil:
		b = &shadowBlock{}
	}
	c := n.newCounts()
	if live != nil {
		copy(c.B, live.counts.B)
	} else if err := format.ReadPadded(n.img.f, c.B, off); err != nil {
		return nil, fmt.Errorf("read refcount block %d: %w", i, err)
	}
	b.counts = c
	n.blocks[i] = b
	return b, nil
}

// slabBytes is how much memory for refcount blocks is allocated at once.
const slabBytes = 8 << 20

// newCounts returns a block of zeros.
func (n *generation) newCounts() format.Counts {
	size := n.g.ClusterSize
	if k := len(n.spare); k > 0 {
		c := n.spare[k-1]
		n.spare = n.spare[:k-1]
		clear(c.B)
		return c
	}
	if int64(len(n.slab)) < size {
		n.slab = host.NewMemory(slabBytes)
	}
	c := format.Counts{B: n.slab[:size:size], Order: n.g.RefcountOrder}
	n.slab = n.slab[size:]
	return c
}

// stock gets memory for some blocks, so that nobody waits for it later. Called without the allocator's lock.
func (n *generation) stock() error {
	short := false
	if err := n.locked(func() error {
		short = len(n.slab) < slabBytes/4 && int64(len(n.spare))*n.g.ClusterSize < slabBytes/4
		return nil
	}); err != nil || !short {
		return err
	}
	slab := host.NewMemory(slabBytes)
	host.Populate(slab)
	return n.locked(func() error { n.slab = slab; return nil })
}

// source returns where the counts of block i are, in memory or on disk; nowhere if it does not exist.
func (n *generation) source(i int64) (off format.HostOffset, live *refBlock) {
	if b := n.blocks[i]; b != nil && b.at != 0 {
		return b.at, nil
	}
	rc := n.img.alloc.rc
	if i < int64(len(rc.table)) {
		off = rc.table[i]
	}
	return off, rc.blocks[i]
}

// ownBlock returns block i to change.
func (n *generation) ownBlock(i int64) (*shadowBlock, error) {
	if i >= format.MaxRefcountTableBytes/8 {
		return nil, fmt.Errorf("%w: refcount block %d; the refcount table would exceed %d MiB", ErrLimit, i, format.MaxRefcountTableBytes>>20)
	}
	b, err := n.block(i)
	if err == nil && b.counts.None() {
		b.counts = n.newCounts()
		n.blocks[i] = b
	}
	return b, err
}

// count returns a cluster's next count.
func (n *generation) count(c format.Cluster) (uint64, error) {
	b, err := n.block(n.g.BlockOf(c))
	if err != nil || b.counts.None() {
		return 0, err
	}
	return b.counts.Get(n.g.InBlock(c)), nil
}

// add changes the next counts of a run.
func (n *generation) add(r format.Run, delta int) error {
	n.img.alloc.leakSearch.touch(r)
	return n.g.EachBlock(r, func(k, i, m int64) error {
		b, err := n.ownBlock(k)
		if err != nil {
			return err
		}
		fell, err := b.add(i, m, delta)
		if err != nil {
			return fmt.Errorf("refcount block %d: %w", k, err)
		}
		if fell.ToZero {
			n.zeroed[k] = struct{}{}
		}
		n.fell1 = n.fell1 || fell.ToOne
		return nil
	})
}

// mirror makes a change of live counts in the next ones too. A block that is the same as the live one follows by itself.
func (n *generation) mirror(r format.Run, delta int) error {
	return n.g.EachBlock(r, func(k, i, m int64) error {
		if _, ok := n.loading[k]; ok {
			n.loading[k] = true
		}
		switch b := n.blocks[k]; {
		case b == nil:
			return nil
		case b.clean():
			n.forget(k)
			return nil
		}
		return n.add(format.Run{First: n.g.Counted(k, i), N: m}, delta)
	})
}

// holds tells that a cluster, which is free in the live generation, is not in this one, or is kept for it.
func (n *generation) holds(c format.Cluster) bool {
	if n.room.Has(c) {
		return true
	}
	_, ok := slices.BinarySearchFunc(n.taken, c, func(r format.Run, c format.Cluster) int {
		switch {
		case r.End() <= c:
			return -1
		case r.First > c:
			return 1
		}
		return 0
	})
	return ok
}

func (n *generation) searchFrom() format.Cluster { return n.next }

// drop gives up the clusters of a structure of length bytes.
func (n *generation) drop(off format.HostOffset, length int64) error {
	return n.add(n.g.RunOf(off, length), -1)
}

// unmake forgets live block k at off, which the table on disk has never had, with the count of its cluster.
func (n *generation) unmake(k int64, off format.HostOffset) {
	if b := n.blocks[k]; b != nil && b.at != 0 && b.old == off {
		b.old = 0 // dropBlock has taken the count away
		return
	}
	_ = n.mirror(n.g.Cluster(off).Alone(), -1)
}

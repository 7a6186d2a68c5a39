package qcow2

import (
	"fmt"
	"slices"
)

// shadowBlock is a refcount block of the next generation: live counts, plus what the operation changes. One that has no
// place yet and has not changed is only a copy of the live one.
type shadowBlock struct {
	refBlock       // without counts if it was written and put out of memory
	at       int64 // its offset, 0 as long as it has none
	old      int64 // offset of the live block whose count has been taken away for it, 0 if there was none
}

// shadowBytes bounds the refcount blocks that an operation keeps in memory.
const shadowBytes = 64 << 20

// The following are called with the allocator's lock held, unless they say otherwise.

// block returns block i, without counts if all are 0 and the live generation has none.
func (n *generation) block(i int64) (*shadowBlock, error) {
	b := n.blocks[i]
	if b != nil && !b.counts.none() {
		return b, nil
	}
	off, live := n.source(i)
	switch {
	case b == nil && live == nil && off == 0:
		return &shadowBlock{}, nil
	case b == nil:
		b = &shadowBlock{}
	}
	c := n.g.newCounts(1)
	if live != nil {
		copy(c.b, live.counts.b)
	} else if err := readPadded(n.img.f, c.b, off); err != nil {
		return nil, fmt.Errorf("read refcount block %d: %w", i, err)
	}
	b.counts = c
	n.blocks[i] = b
	return b, nil
}

// source returns where the counts of block i are, in memory or on disk; nowhere if it does not exist.
func (n *generation) source(i int64) (off int64, live *refBlock) {
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
	if i >= maxRefcountTableBytes/8 {
		return nil, fmt.Errorf("%w: refcount block %d; the refcount table would exceed %d MiB", ErrLimit, i, maxRefcountTableBytes>>20)
	}
	b, err := n.block(i)
	if err == nil && b.counts.none() {
		b.counts = n.g.newCounts(1)
		n.blocks[i] = b
	}
	return b, err
}

// count returns a cluster's next count.
func (n *generation) count(c int64) (uint64, error) {
	b, err := n.block(c >> n.g.blockBits)
	if err != nil || b.counts.none() {
		return 0, err
	}
	return b.counts.get(c & (n.g.blockCounts - 1)), nil
}

// add changes the next counts of a run.
func (n *generation) add(r run, delta int) error {
	n.img.alloc.search.touch(r)
	return n.g.eachBlock(r, func(k, i, m int64) error {
		b, err := n.ownBlock(k)
		if err != nil {
			return err
		}
		fell, err := b.add(i, m, delta)
		if err != nil {
			return fmt.Errorf("refcount block %d: %w", k, err)
		}
		if fell.to0 {
			n.zeroed[k] = struct{}{}
		}
		n.fell1 = n.fell1 || fell.to1
		return nil
	})
}

// mirror makes a change of live counts in the next ones too. A block that is the same as the live one follows by itself.
func (n *generation) mirror(r run, delta int) error {
	return n.g.eachBlock(r, func(k, i, m int64) error {
		if _, ok := n.loading[k]; ok {
			n.loading[k] = true
		}
		switch b := n.blocks[k]; {
		case b == nil:
			return nil
		case b.at == 0 && b.dirty.empty():
			delete(n.blocks, k)
			return nil
		}
		return n.add(run{k<<n.g.blockBits + i, m}, delta)
	})
}

// holds tells that a cluster, which is free in the live generation, is not in this one.
func (n *generation) holds(c int64) bool {
	_, ok := slices.BinarySearchFunc(n.taken, c, func(r run, c int64) int {
		switch {
		case r.end() <= c:
			return -1
		case r.first > c:
			return 1
		}
		return 0
	})
	return ok
}

// longRun is how many free clusters there have to be in a row for metadata to go there, so that it is written in long runs.
// Smaller gaps are left to guests' data.
const longRun = 16

// take allocates k neighbouring clusters for the next generation.
func (n *generation) take(k int64) (run, error) {
	if free, err := n.img.alloc.rc.freeRun(n.next, k); err != nil {
		return run{}, err
	} else if free < k {
		if n.next, err = n.img.alloc.rc.nextFreeRun(n.next, max(k, longRun)); err != nil {
			return run{}, err
		}
	}
	r := run{n.next, k}
	if err := n.img.alloc.refuse(r); err != nil {
		return run{}, err
	}
	n.next = r.end()
	n.taken.add(r)
	return r, n.add(r, 1)
}

// drop gives up the clusters of a structure of length bytes.
func (n *generation) drop(off, length int64) error {
	return n.add(run{off >> n.g.clusterBits, n.g.clusters(length)}, -1)
}

// preload reads the refcount blocks of clusters ahead of their use. Called without the allocator's lock: guests'
// allocations do not wait for the disk.
func (n *generation) preload(rs []entryRun) error {
	var missing []int64
	last := int64(-1)
	err := n.locked(func() error {
		for _, r := range rs {
			for k := r.hosts.first >> n.g.blockBits; k <= (r.hosts.end()-1)>>n.g.blockBits; k++ {
				if k == last {
					continue
				}
				last = k
				if b := n.blocks[k]; b != nil && !b.counts.none() {
					continue
				}
				if off, live := n.source(k); live != nil || off == 0 {
					continue
				}
				if _, ok := n.loading[k]; !ok {
					n.loading[k] = false
					missing = append(missing, k)
				}
			}
		}
		return nil
	})
	for _, k := range missing {
		if err == nil {
			err = n.preloadBlock(k)
		}
	}
	if err != nil {
		_ = n.locked(func() error { clear(n.loading); return nil })
	}
	return err
}

func (n *generation) preloadBlock(k int64) error {
	var off int64
	if err := n.locked(func() error { off, _ = n.source(k); return nil }); err != nil {
		return err
	}
	c := n.g.newCounts(1)
	if err := readPadded(n.img.f, c.b, off); err != nil {
		return fmt.Errorf("read refcount block %d: %w", k, err)
	}
	return n.locked(func() error {
		stale := n.loading[k]
		delete(n.loading, k)
		b := n.blocks[k]
		switch {
		case stale || b != nil && !b.counts.none():
			return nil
		case b == nil:
			b = &shadowBlock{}
			n.blocks[k] = b
		}
		b.counts = c
		return nil
	})
}

// The following are called without the allocator's lock.

// placeBlocks gives each changed refcount block a place, which changes counts, perhaps in one more block.
func (n *generation) placeBlocks() error {
	for {
		var ks []int64
		if err := n.locked(func() error {
			for k, b := range n.blocks {
				if b.at == 0 && !b.dirty.empty() {
					ks = append(ks, k)
				}
			}
			return nil
		}); err != nil || len(ks) == 0 {
			return err
		}
		slices.Sort(ks)
		for _, k := range ks {
			if err := n.locked(func() error { return n.placeBlock(k) }); err != nil {
				return err
			}
		}
	}
}

// placeBlock gives one block a place. Called with the allocator's lock held.
func (n *generation) placeBlock(k int64) error {
	r, err := n.take(1)
	if err != nil {
		return err
	}
	n.img.alloc.metadata.put(r, metadataSole)
	b := n.blocks[k]
	b.at, b.dirty = r.first<<n.g.clusterBits, n.g.allSectors()
	return n.dropBlock(k)
}

// dropBlock gives up the live block that block k replaces, if there is one and it has not been done. Called with the
// allocator's lock held.
func (n *generation) dropBlock(k int64) error {
	b, table := n.blocks[k], n.img.alloc.rc.table
	if k >= int64(len(table)) || table[k] == b.old {
		return nil
	}
	b.old = table[k]
	return n.drop(b.old, n.g.clusterSize)
}

// writeBlocks writes what has changed in blocks that have a place.
func (n *generation) writeBlocks() error {
	var ks []int64
	if err := n.locked(func() error {
		for k, b := range n.blocks {
			if b.at != 0 && !b.dirty.empty() {
				ks = append(ks, k)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	slices.Sort(ks)
	for _, k := range ks {
		if err := n.writeBlock(k); err != nil {
			return err
		}
	}
	return nil
}

func (n *generation) writeBlock(k int64) error {
	var parts []metaWrite
	if err := n.locked(func() error {
		b := n.blocks[k]
		parts = b.dirty.parts(b.counts.b, b.at)
		b.dirty = nil
		return nil
	}); err != nil {
		return err
	}
	for _, p := range parts {
		if err := n.out.write(p.off, p.b); err != nil {
			return err
		}
	}
	return nil
}

// trim puts refcount blocks out of memory when there are too many.
func (n *generation) trim() error {
	limit := max(shadowBytes>>n.g.clusterBits, 64)
	var many bool
	if err := n.locked(func() error { many = len(n.blocks) > limit && n.resident() > limit; return nil }); err != nil || !many {
		return err
	}
	for _, step := range []func() error{n.placeBlocks, n.writeBlocks, n.out.flush} {
		if err := step(); err != nil {
			return err
		}
	}
	return n.locked(func() error {
		for k, b := range n.blocks {
			switch {
			case !b.dirty.empty():
			case b.at == 0:
				delete(n.blocks, k)
			default:
				b.counts = counts{}
			}
		}
		return nil
	})
}

// resident returns how many blocks are in memory. Called with the allocator's lock held.
func (n *generation) resident() int {
	count := 0
	for _, b := range n.blocks {
		if !b.counts.none() {
			count++
		}
	}
	return count
}

package qcow2

import (
	"fmt"
	"iter"
	"math"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file looks for clusters that are free in the live and in the next generation, and reads refcount blocks ahead of
// their use: guests' allocations do not wait for the disk.

// longRun is how many free clusters there have to be in a row for metadata to go there, so that it is written in long runs.
// Smaller gaps are left to guests' data.
const longRun = 16

// searchBlocks is how many refcount blocks are looked at together.
const searchBlocks = 16

// seek moves the search on to k free clusters, so that take finds them at once. Called without the allocator's lock.
func (n *generation) seek(k int64) error {
	for blocks, found := int64(1), false; !found; blocks = searchBlocks {
		first := n.g.BlockOf(n.next)
		if err := n.preload(n.g.BlocksOf(format.Run{First: n.g.Counted(first, 0), N: blocks * n.g.BlockCounts})); err != nil {
			return err
		}
		if err := n.locked(func() error {
			stop := n.g.Counted(first+blocks, 0)
			err := n.search(k, stop)
			found = n.next < stop
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// The following are called with the allocator's lock held.

// search moves the search on to k free clusters, or to stop if there are none before it.
func (n *generation) search(k int64, stop format.Cluster) error {
	free, err := n.freeRun(n.next, k)
	if err != nil || free == k {
		return err
	}
	for n.next < stop {
		block, i := n.g.BlockOf(n.next), n.g.InBlock(n.next)
		from, _, err := n.freeIn(block, i, 1)
		if err != nil {
			return err
		}
		n.next += format.Cluster(from - i)
		if from == n.g.BlockCounts {
			n.unload(block)
			continue
		}
		if free, err = n.freeRun(n.next, max(k, longRun)); err != nil || free >= max(k, longRun) {
			return err
		}
		n.next += format.Cluster(free)
	}
	return nil
}

// freeRun returns how many clusters from c on are free, up to k.
func (n *generation) freeRun(c format.Cluster, k int64) (int64, error) {
	free := int64(0)
	for free < k {
		at := c + format.Cluster(free)
		i := n.g.InBlock(at)
		from, end, err := n.freeIn(n.g.BlockOf(at), i, k-free)
		if err != nil {
			return 0, err
		}
		if from > i {
			break
		}
		if free += end - i; end < n.g.BlockCounts {
			break
		}
	}
	return min(free, k), nil
}

// freeIn returns the first free clusters of block k from index i on, at most so many; from is behind the last one if there
// are none.
func (n *generation) freeIn(k, i, most int64) (from, end int64, err error) {
	b, err := n.block(k)
	if err != nil {
		return 0, 0, err
	}
	from, end = b.counts.Zeros(i, most, n.g.BlockCounts)
	if _, fell := n.zeroed[k]; !fell {
		return from, end, nil // what the live generation counts, this one does
	}
	live, err := n.img.alloc.rc.block(k)
	if err != nil || live == nil {
		return from, end, err
	}
	for from < n.g.BlockCounts {
		first, last := live.counts.Zeros(from, most, n.g.BlockCounts)
		if first < end {
			return first, min(last, end), nil
		}
		from, end = b.counts.Zeros(first, most, n.g.BlockCounts)
	}
	return from, end, nil
}

// unload puts block k out of memory again if it was only looked at, and memory is short.
func (n *generation) unload(k int64) {
	if b := n.blocks[k]; b != nil && b.clean() && len(n.blocks) > n.limit() {
		n.forget(k)
	}
}

// take allocates k neighbouring clusters for the next generation.
func (n *generation) take(k int64) (format.Run, error) {
	if err := n.search(k, math.MaxInt64); err != nil {
		return format.Run{}, err
	}
	r := format.Run{First: n.next, N: k}
	if err := n.img.alloc.refuse(r); err != nil {
		return format.Run{}, err
	}
	n.next = r.End()
	n.taken.Add(r)
	return r, n.add(r, 1)
}

// preload reads refcount blocks that are not in memory. Called without the allocator's lock.
func (n *generation) preload(ks iter.Seq[int64]) error {
	type read struct {
		k      int64
		off    format.HostOffset
		counts format.Counts
	}
	if err := n.stock(); err != nil {
		return err
	}
	var reads []read
	if err := n.locked(func() error {
		for k := range ks {
			if b := n.blocks[k]; b != nil && !b.counts.None() {
				continue
			}
			off, live := n.source(k)
			if _, ok := n.loading[k]; live != nil || off == 0 || ok {
				continue
			}
			n.loading[k] = false
			reads = append(reads, read{k, off, n.newCounts()})
		}
		return nil
	}); err != nil || len(reads) == 0 {
		return err
	}
	for _, r := range reads {
		if err := format.ReadPadded(n.img.f, r.counts.B, r.off); err != nil {
			return fmt.Errorf("read refcount block %d: %w", r.k, err) // the build ends
		}
	}
	return n.locked(func() error {
		for _, r := range reads {
			if stale := n.loading[r.k]; stale {
				n.spare = append(n.spare, r.counts)
			} else if b := n.blocks[r.k]; b != nil {
				b.counts = r.counts
			} else {
				n.blocks[r.k] = &shadowBlock{refBlock: refBlock{counts: r.counts}}
			}
			delete(n.loading, r.k)
		}
		return nil
	})
}

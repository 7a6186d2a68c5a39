package qcow2

import (
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file gives what the next generation has in memory a place on disk. Its functions are called without the allocator's lock,
// unless they say otherwise.

// placeBlocks gives each changed refcount block a place, which changes counts, perhaps in one more block.
func (n *generation) placeBlocks() error {
	for {
		var ks []int64
		if err := n.locked(func() error {
			for k, b := range n.blocks {
				if b.at == 0 && !b.dirty.Empty() {
					ks = append(ks, k)
				}
			}
			return nil
		}); err != nil || len(ks) == 0 {
			return err
		}
		slices.Sort(ks)
		for _, k := range ks {
			if err := n.seek(1); err != nil {
				return err
			}
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
	b.at, b.dirty = n.g.Offset(r.First), n.g.AllSectors()
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
	return n.drop(b.old, n.g.ClusterSize)
}

// writeBlocks writes what has changed in blocks that have a place.
func (n *generation) writeBlocks() error {
	var ks []int64
	if err := n.locked(func() error {
		for k, b := range n.blocks {
			if b.at != 0 && !b.dirty.Empty() {
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
		n.pace(0)
	}
	return nil
}

func (n *generation) writeBlock(k int64) error {
	var b *shadowBlock
	var dirty format.SectorSet
	if err := n.locked(func() error {
		b = n.blocks[k]
		dirty, b.dirty = b.dirty, nil
		return nil
	}); err != nil {
		return err
	}
	var err error
	dirty.Each(func(first, m int64) {
		at, end := first*format.SectorSize, min((first+m)*format.SectorSize, n.g.ClusterSize)
		if err == nil {
			err = n.out.turnTo(b.at.Plus(at), end-at)
		}
		if err == nil {
			err = n.locked(func() error { n.out.b = append(n.out.b, b.counts.B[at:end]...); return nil })
		}
	})
	return err
}

// trim puts refcount blocks out of memory when there are too many.
func (n *generation) trim() error {
	var many bool
	if err := n.locked(func() error { many = len(n.blocks) > n.limit() && n.resident() > n.limit(); return nil }); err != nil || !many {
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
			case b.clean():
				n.forget(k)
			case b.dirty.Empty() && !b.counts.None():
				n.spare = append(n.spare, b.counts)
				b.counts = format.Counts{}
			}
		}
		return nil
	})
}

// resident returns how many blocks are in memory. Called with the allocator's lock held.
func (n *generation) resident() int {
	count := 0
	for _, b := range n.blocks {
		if !b.counts.None() {
			count++
		}
	}
	return count
}

// giveUp takes away the references that guests have given up durably. The live counts keep them.
func (n *generation) giveUp() error {
	n.img.mu.Lock()
	rs := n.deferred[n.given:]
	n.given = len(n.deferred)
	n.img.mu.Unlock()
	for _, r := range rs {
		if err := n.preload(n.g.BlocksOf(r)); err != nil {
			return err
		}
		if err := n.locked(func() error { return n.giveUpRun(r) }); err != nil {
			return err
		}
	}
	return n.trim()
}

// giveUpRun is giveUp for one run. Called with the allocator's lock held.
func (n *generation) giveUpRun(r format.Run) error {
	for c := r.First; c < r.End(); {
		if n.ahead[c] > 0 {
			n.ahead[c]--
			c++
			continue
		}
		end := c + 1
		for end < r.End() && n.ahead[end] == 0 {
			end++
		}
		if err := n.add(format.RunTo(c, end), -1); err != nil {
			return err
		}
		c = end
	}
	return nil
}

// place takes clusters for b, has it written and returns its offset.
func (n *generation) place(b []byte) (format.HostOffset, error) {
	var r format.Run
	k := max(n.g.Clusters(int64(len(b))), 1)
	err := n.seek(k)
	if err == nil {
		err = n.locked(func() (err error) {
			r, err = n.take(k)
			return err
		})
	}
	if err != nil {
		return 0, err
	}
	n.img.alloc.metadata.put(r, metadataSole)
	off := n.g.Offset(r.First)
	if err := n.out.write(off, b); err != nil {
		return 0, err
	}
	return off, n.out.zeros(n.g.Bytes(r.N) - int64(len(b)))
}

package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// claim is a reservation's search: it counts free clusters, block by block, in memory. Used with the ledger held; guests get
// at the clusters that are ready between two blocks, and do not wait for reads.
type claim struct {
	a         *allocator
	at        format.Cluster // the search goes on here
	next      format.Cluster // the allocator's next as this search has left it; -1: it must not move on
	missing   int64          // clusters still wanted
	need      int64          // and so many of them now
	got       format.Runs
	newBlocks []int64 // refcount blocks that it made; the table on disk does not yet point at them
}

// maxClaimed is how many runs a search ends with: each is punched, and counted in a sector of its own perhaps, while the
// ledger is held.
const maxClaimed = 64

func (c *claim) search() error {
	for blocks := int64(1); c.missing > 0 && len(c.got) < maxClaimed; blocks = min(claimBlocks, int64(c.a.rc.limit)) {
		if err := c.a.fetch(c.ahead(blocks)); err != nil {
			return err
		}
		k := c.a.g.BlockOf(c.at)
		for c.a.g.BlockOf(c.at) < k+blocks && c.missing > 0 && len(c.got) < maxClaimed {
			if err := c.step(); err != nil {
				return err
			}
		}
	}
	return nil
}

// claimBlocks is how many refcount blocks are read together when the first has not been enough.
const claimBlocks = 8

// ahead returns the refcount blocks, up to n, that the search will look at.
func (c *claim) ahead(n int64) []int64 {
	a := c.a
	a.mu.Lock()
	defer a.mu.Unlock()
	var ks []int64
	first := a.g.BlockOf(c.at)
	for k := first; k < first+n; k++ {
		if _, busy := a.unsafe[k]; !busy || a.g.Counted(k+1, 0) > a.unsafeEnd {
			ks = append(ks, k)
		}
	}
	return ks
}

// step claims a run in the refcount block that counts at, or moves the search on.
func (c *claim) step() error {
	a := c.a
	a.mu.Lock()
	defer a.mu.Unlock()
	k, i := a.g.BlockOf(c.at), a.g.InBlock(c.at)
	behind := a.g.Counted(k+1, 0)
	if _, busy := a.unsafe[k]; busy && c.at < a.unsafeEnd {
		c.at, c.next = min(behind, a.unsafeEnd), -1 // what is skipped is free soon, and the rest can wait for it
		c.missing = min(c.missing, c.need)
		return nil
	}
	b, err := a.rc.block(k)
	if err != nil {
		return err
	}
	if b != nil {
		i = b.counts.NextZero(i)
	}
	for i < a.g.BlockCounts && !a.free(a.g.Counted(k, i)) {
		if i++; b != nil {
			i = b.counts.NextZero(i)
		}
	}
	switch c.at = a.g.Counted(k, i); {
	case c.at == behind:
		return nil
	case k >= int64(len(a.rc.table)):
		if err := a.growTable(); err != nil {
			return err
		}
		c.newBlocks = nil // the new table points at them
		return nil
	case b == nil:
		if err := a.newBlock(k, c.at); err != nil {
			return err
		}
		c.newBlocks = append(c.newBlocks, k)
		return nil
	}
	return c.take(b, i)
}

// take claims free clusters from at on, which block b counts at index i. Called with the allocator's lock held.
func (c *claim) take(b *refBlock, i int64) error {
	a, end := c.a, i
	for end < a.g.BlockCounts && end-i < c.missing && b.counts.Get(end) == 0 && a.free(c.at+format.Cluster(end-i)) {
		end++
	}
	r := format.Run{First: c.at, N: end - i}
	if err := a.refuse(r); err != nil {
		return err
	}
	if _, err := a.add(r, 1); err != nil {
		return err
	}
	c.got.Add(r)
	c.missing, c.need, c.at = c.missing-r.N, max(c.need-r.N, 0), r.End()
	if a.next == c.next { // else clusters before it have become free meanwhile
		a.next, c.next = c.at, c.at
	}
	return nil
}

// newBlock makes refcount block k in cluster c, a free one that it counts itself. Called with the allocator's lock held.
func (a *allocator) newBlock(k int64, c format.Cluster) error {
	r := c.Alone()
	if err := a.refuse(r); err != nil {
		return err
	}
	if err := a.metadata.add(r, metadataSole); err != nil {
		return err
	}
	a.leakSearch.touch(r)
	b := &refBlock{counts: a.g.NewCounts(1)}
	b.counts.Set(a.g.InBlock(c), 1)
	for s := range a.g.ClusterSize / format.SectorSize {
		b.dirty.Add(s)
	}
	a.rc.table[k] = a.g.Offset(r.First)
	a.rc.keep(k, b)
	if a.build != nil {
		return a.build.mirror(r, 1)
	}
	return nil
}

// undo takes the claim back in memory. On disk counts may stay, which leaks; blocks that nothing points at are forgotten.
// Called with the allocator's lock held.
func (c *claim) undo() {
	a := c.a
	for _, r := range c.got {
		a.next = min(a.next, r.First)
		_ = a.g.EachBlock(r, func(k, i, n int64) error {
			if b := a.rc.blocks[k]; b != nil {
				_, err := a.add(format.Run{First: a.g.Counted(k, i), N: n}, -1)
				return err
			}
			return nil
		})
	}
	for _, k := range c.newBlocks {
		off := a.rc.table[k]
		a.metadata.remove(a.g.Cluster(off).Alone())
		if a.build != nil {
			a.build.unmake(k, off)
		}
		a.rc.forget(k)
	}
}

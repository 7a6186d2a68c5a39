package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// release gives clusters up once each: those that nobody counts any more are punched and free. Nothing durable
// may reference them (I4).
func (a *allocator) release(rs format.Runs) error {
	if len(rs) == 0 {
		return nil
	}
	a.ledger.Lock()
	defer a.ledger.Unlock()
	for part, blocks := range a.g.ByBlocks(rs, min(releaseBlocks, a.rc.limit)) {
		if err := a.fetch(blocks); err != nil {
			return err
		}
		if err := a.releasePart(part); err != nil {
			return err
		}
		if a.crowded() {
			_ = a.writeBack() // what was not written is dirty still: the next reservation tells
		}
	}
	return nil
}

// releaseBlocks is how many refcount blocks are read together for a release.
const releaseBlocks = 64

// crowded tells whether so many counts have changed that they should be written, for the sake of memory.
func (a *allocator) crowded() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rc.crowded()
}

// releasePart is release with ledger held.
func (a *allocator) releasePart(rs format.Runs) error {
	sole, others, err := a.bySoleness(rs)
	if err != nil {
		return err
	}
	for _, r := range sole { // as long as they are counted, nobody takes them
		if err := a.punchHole(r); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range sole {
		zero, err := a.add(r, -1)
		if err != nil {
			return err
		}
		a.reuse(zero)
	}
	return a.releaseLocked(others)
}

// bySoleness splits runs into those that are counted once and others. Called with ledger held, so that this stays so.
func (a *allocator) bySoleness(rs format.Runs) (sole, others format.Runs, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range rs {
		err := a.g.EachBlock(r, func(k, i, n int64) error {
			b, err := a.rc.block(k)
			if err != nil || b == nil {
				others.Add(format.Run{First: a.g.Counted(k, i), N: n})
				return err
			}
			for first, end := i, i+n; i < end; first = i {
				if i = b.counts.Alike(first, end-first, 1); i > first {
					sole.Add(format.Run{First: a.g.Counted(k, first), N: i - first})
					continue
				}
				i = b.counts.Find(first, end-first, 1)
				others.Add(format.Run{First: a.g.Counted(k, first), N: i - first})
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
	}
	return sole, others, nil
}

func (a *allocator) releaseLocked(rs format.Runs) error {
	for _, r := range rs {
		zero, err := a.add(r, -1)
		if err != nil {
			return err
		}
		if err := a.punch(zero); err != nil {
			return err
		}
	}
	return nil
}

// punch gives the blocks of free clusters back to the file system. Called with mu held, so that no cluster is
// handed out before its punch is done.
func (a *allocator) punch(free format.Runs) error {
	a.reuse(free)
	for _, r := range free {
		if err := a.punchHole(r); err != nil {
			return err
		}
	}
	return nil
}

// reuse notes that clusters are free. Called with mu held.
func (a *allocator) reuse(free format.Runs) {
	for _, r := range free {
		a.metadata.remove(r)
		a.next = min(a.next, r.First)
	}
}

// punchHole punches clusters, as far as the file reaches.
func (a *allocator) punchHole(r format.Run) error {
	at := a.g.Offset(r.First)
	if n := min(a.g.Bytes(r.N), int64(a.fileEnd()-at)); n > 0 {
		return a.f.PunchHole(int64(at), n)
	}
	return nil
}

// close returns what is left of the reservation, writes all counts, syncs, and cuts the free end off the file, which may
// also come back after a crash.
func (a *allocator) close() error {
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.giveBack(); err != nil {
		return err
	}
	if err := a.sync(); err != nil {
		return err
	}
	last := a.g.ClusterBehind(a.fileEnd()) - 1
	for last > 0 {
		b, err := a.rc.block(a.g.BlockOf(last))
		if err != nil {
			return err
		}
		switch {
		case b == nil: // nothing is counted under it
			last = max(a.g.Counted(a.g.BlockOf(last), 0)-1, 0)
			continue
		case b.counts.Get(a.g.InBlock(last)) == 0:
			last--
			continue
		}
		break
	}
	if end := int64(a.g.Offset(last + 1)); end < a.length.Load() {
		if err := a.f.Truncate(end); err != nil {
			return err
		}
		a.length.Store(end)
	}
	return nil
}

// endReservation returns what is left of the reservation and writes all counts.
func (a *allocator) endReservation() error {
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.giveBack()
}

// giveBack is endReservation with its locks held.
func (a *allocator) giveBack() error {
	for len(a.ready) > 0 {
		r := a.ready[0]
		a.ready = a.ready[1:] // first: what has been released, in part even, must not be handed out
		if err := a.releaseLocked(format.Runs{r}); err != nil {
			return err
		}
	}
	return a.rc.writeBack()
}

// punchCounted punches those clusters that are counted once. Called with ledger held.
func (a *allocator) punchCounted(rs format.Runs) error {
	for part, blocks := range a.g.ByBlocks(rs, min(releaseBlocks, a.rc.limit)) {
		if err := a.fetch(blocks); err != nil {
			return err
		}
		sole, _, err := a.bySoleness(part)
		if err != nil {
			return err
		}
		for _, r := range sole {
			if err := a.punchHole(r); err != nil {
				return err
			}
		}
	}
	return nil
}

package qcow2

import (
	"fmt"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// scan checks an L2 table, notes its runs and reads the refcount blocks that count them ahead of their use.
func (n *generation) scan(off format.HostOffset, t format.L2Table) error {
	var err error
	if n.runs, err = t.EntryRuns(n.g, n.img.version, n.runs[:0]); err != nil {
		return fmt.Errorf("L2 table at file offset %#x, %w", off, err)
	}
	end := n.g.ClusterBehind(n.img.alloc.fileEnd())
	for _, r := range n.runs {
		// Counts behind the end of the file would take memory that it does not justify.
		if r.Hosts.End() > end {
			return fmt.Errorf("%w: L2 table at file offset %#x, entry %d maps clusters %d to %d, behind the end of the file",
				ErrCorrupt, off, r.First, r.Hosts.First, r.Hosts.End()-1)
		}
	}
	if err := n.preload(func(yield func(int64) bool) {
		last := n.g.BlockOf(n.g.Cluster(off))
		ok := yield(last)
		for _, r := range n.runs {
			for k := range n.g.BlocksOf(r.Hosts) {
				if ok && k != last {
					ok, last = yield(k), k
				}
			}
		}
	}); err != nil {
		return err
	}
	return n.trim()
}

// referenceRuns changes the counts of an L2 table and, as scan found them, of its clusters. Called with the allocator's lock
// held.
func (n *generation) referenceRuns(off format.HostOffset, delta int) error {
	if err := n.add(n.g.Cluster(off).Alone(), delta); err != nil {
		return err
	}
	for _, r := range n.runs {
		if delta < 0 { // what becomes free must not be metadata
			if err := n.img.alloc.metadata.refuse(r.Hosts); err != nil {
				return fmt.Errorf("L2 table at file offset %#x: %w", off, err)
			}
		}
		if err := n.add(r.Hosts, delta); err != nil {
			return fmt.Errorf("L2 table at file offset %#x: %w", off, err)
		}
	}
	return nil
}

// unreference takes away the references of all that an L1 table reaches: its L2 tables and their clusters, once per path.
func (n *generation) unreference(l1 []format.L1Entry) error {
	return n.eachTable(l1, func(_ int64, off format.HostOffset, t format.L2Table) error {
		if err := n.scan(off, t); err != nil {
			return err
		}
		return n.locked(func() error { return n.referenceRuns(off, -1) })
	})
}

// flag gives the next generation a table of its own wherever COPIED flags of an active table do not agree with the
// next counts (I2). The other one stays as it is, for a snapshot or for the old generation.
func (n *generation) flag(l1 []format.L1Entry) error {
	return n.eachTable(l1, func(i int64, off format.HostOffset, t format.L2Table) error {
		if n.sawChange(i) {
			return nil // catchUp looks at it
		}
		return n.flagTable(i, off, t, false)
	})
}

// flagTable is flag for the table that the live generation has at off, 0 for none. t becomes the next one. If that is not
// what lies at off, both generations cannot have that: what guests have given up there would keep flags that only the
// live one's counts agree with.
func (n *generation) flagTable(i int64, off format.HostOffset, t format.L2Table, differs bool) error {
	if err := n.scan(off, t); err != nil {
		return err
	}
	changed, sole := false, false
	if err := n.locked(func() (err error) {
		if changed, err = n.setCopied(t, n.runs); err != nil || changed {
			return err
		}
		c, err := n.count(n.g.Cluster(off))
		sole = c == 1
		return err
	}); err != nil {
		return err
	}
	if sole {
		n.copied[i] = off
	}
	if !changed && !differs {
		return nil
	}
	return n.replace(i, off, t)
}

// replace gives the next generation a table of its own for an active one, which the live generation has at off.
func (n *generation) replace(i int64, off format.HostOffset, t format.L2Table) error {
	next := &nextTable{old: off}
	if err := n.seek(1); err != nil {
		return err
	}
	if err := n.locked(func() error {
		r, err := n.take(1)
		if err != nil {
			return err
		}
		next.at = n.g.Offset(r.First)
		n.img.alloc.metadata.put(r, metadataL2)
		if off == 0 {
			return nil
		}
		return n.dropTable(off)
	}); err != nil {
		return err
	}
	n.tables[i] = next
	return n.out.write(next.at, t.B)
}

// dropTable takes away the active state's reference to a live table, ahead of any guest that may give it up. Called with
// the allocator's lock held.
func (n *generation) dropTable(off format.HostOffset) error {
	n.ahead[n.g.Cluster(off)]++
	return n.drop(off, n.g.ClusterSize)
}

// keepTable is for a table that a guest has replaced: unless it is given up already, that is still to come, and takes
// away the reference. Called with the allocator's lock held.
func (n *generation) keepTable(off format.HostOffset) error {
	c := n.g.Cluster(off)
	if n.ahead[c] == 0 {
		return nil
	}
	n.ahead[c]--
	return n.add(c.Alone(), 1)
}

// setCopied sets COPIED where the next count is 1, and nowhere else. t has the runs rs. Called with the allocator's
// lock held.
func (n *generation) setCopied(t format.L2Table, rs []format.EntryRun) (changed bool, err error) {
	for _, r := range rs {
		if r.Packed {
			continue
		}
		at := r.First
		err = n.g.EachBlock(r.Hosts, func(k, first, m int64) error {
			b, err := n.block(k)
			if err != nil {
				return err
			}
			for c, j, end := b.counts, first, first+m; j < end; {
				sole, others := j, end // ends of the counts of 1 from j on, and of those that follow
				if !c.None() {
					sole = c.Alike(j, end-j, 1)
					others = c.Find(sole, end-sole, 1)
				}
				wrong, last := sole, others
				if !r.Copied {
					wrong, last = j, sole
				}
				if wrong < last {
					t.SetCopied(at+wrong-first, last-wrong, !r.Copied)
					changed = true
				}
				j = others
			}
			at += m
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	return changed, nil
}

// note notes that guests have changed a table, and returns the set of sectors to add to. Called with the image's lock held.
func (n *generation) note(i int64) *format.SectorSet {
	set := n.dirty[i]
	if set == nil {
		set = new(format.SectorSet)
		n.dirty[i] = set
	}
	return set
}

// sawChange tells whether a guest has changed a table since the build last looked at it.
func (n *generation) sawChange(i int64) bool {
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	_, ok := n.dirty[i]
	return ok
}

// tableChange is what guests have changed in an active table since the build saw it.
type tableChange struct {
	index   int64
	live    format.HostOffset // of the table
	set     format.SectorSet  // the sectors that have changed
	t       format.L2Table    // the content; without bytes if it is on disk as it is in memory
	differs bool              // from what is on disk
}

// changed returns the L1 indexes of the tables that guests have changed, in order. Called with the image's lock held.
func (n *generation) changed() []int64 {
	is := slices.Sorted(maps.Keys(n.dirty))
	return slices.DeleteFunc(is, func(i int64) bool { return i >= n.l1Keep })
}

// takeChange returns what guests have changed in a table, with its content in buf, and forgets that they have. Called with
// the image's lock held: it reads nothing.
func (n *generation) takeChange(i int64, buf []byte) tableChange {
	c := tableChange{index: i, live: n.img.l1[i].Offset(), set: *n.dirty[i], t: format.L2Table{Extended: n.g.Extended}}
	if t := n.img.l2.peek(i); t != nil {
		c.t.B, c.differs = buf[:copy(buf, t.data.B)], !t.clean()
	}
	delete(n.dirty, i)
	return c
}

// apply brings the next generation's table up to date with a change.
func (n *generation) apply(c tableChange) error {
	if c.live == 0 {
		return nil
	}
	if c.t.B == nil {
		var err error
		if c.t, err = format.ReadL2(n.img.f, n.g, c.live); err != nil {
			return err
		}
	}
	next := n.tables[c.index]
	if next == nil {
		return n.flagTable(c.index, c.live, c.t, c.differs)
	}
	if next.old != c.live { // a guest has given its table up for a new one
		err := n.locked(func() error {
			if err := n.keepTable(next.old); err != nil {
				return err
			}
			return n.dropTable(c.live)
		})
		if err != nil {
			return err
		}
		next.old = c.live
	}
	if c.set.Empty() {
		return nil
	}
	var err error
	c.set.Each(func(first, k int64) {
		at := first * format.SectorSize
		part := format.L2Table{B: c.t.B[at : at+k*format.SectorSize], Extended: n.g.Extended}
		if err == nil {
			err = n.scan(c.live, part)
		}
		if err == nil {
			err = n.locked(func() error { _, err := n.setCopied(part, n.runs); return err })
		}
		if err == nil {
			err = n.out.write(next.at.Plus(at), part.B)
		}
	})
	return err
}

package qcow2

import "fmt"

// reference changes the counts of all that an L1 table reaches: its L2 tables and their clusters, once per path.
func (n *generation) reference(l1 []l1Entry, delta int) error {
	return n.img.eachTable(l1, func(_, off int64, t table) error {
		return n.locked(func() error { return n.referenceTable(off, t, delta) })
	})
}

// referenceTable is reference for one L2 table. Called with the allocator's lock held.
func (n *generation) referenceTable(off int64, t table, delta int) error {
	if err := n.add(run{off >> n.g.clusterBits, 1}, delta); err != nil {
		return err
	}
	var rs runs
	for i := range t.len() {
		e := t.entry(i)
		if err := e.check(n.g, n.img.version); err != nil {
			return fmt.Errorf("L2 table at file offset %#x, entry %d: %w", off, i, err)
		}
		first, m := e.hostClusters(n.g)
		rs.add(run{first, m})
	}
	end := n.g.clusters(n.img.alloc.length.Load())
	for _, r := range rs {
		// Counts behind the end of the file would take memory that it does not justify.
		if r.end() > end {
			return fmt.Errorf("%w: L2 table at file offset %#x maps clusters %d to %d, behind the end of the file", ErrCorrupt, off, r.first, r.end()-1)
		}
		if delta < 0 { // what becomes free must not be metadata
			if err := n.img.alloc.metadata.refuse(r); err != nil {
				return fmt.Errorf("L2 table at file offset %#x: %w", off, err)
			}
		}
		if err := n.add(r, delta); err != nil {
			return fmt.Errorf("L2 table at file offset %#x: %w", off, err)
		}
	}
	return nil
}

// flag gives the next generation a table of its own wherever COPIED flags of an active table do not agree with the
// next counts (I2). The other one stays as it is, for a snapshot or for the old generation.
func (n *generation) flag(l1 []l1Entry) error {
	return n.img.eachTable(l1, func(i, _ int64, t table) error {
		if n.sawChange(i) {
			return nil // finish looks at it
		}
		return n.locked(func() error { return n.flagTable(i, t) })
	})
}

// flagTable is flag for one table, whose content becomes the next one. Called with the allocator's lock held.
func (n *generation) flagTable(i int64, t table) error {
	changed, err := n.setCopied(t)
	if err != nil {
		return err
	}
	if off, ok := n.tables[i]; ok {
		return n.write(run{off >> n.g.clusterBits, 1}, t.b)
	}
	if changed {
		n.tables[i], err = n.place(t.b)
	}
	return err
}

// setCopied sets COPIED in t where the next count is 1, and nowhere else.
func (n *generation) setCopied(t table) (changed bool, err error) {
	for i := range t.len() {
		e := t.entry(i)
		if e.kind() == kindCompressed || e.offset() == 0 {
			continue
		}
		c, err := n.count(e.offset() >> n.g.clusterBits)
		if err != nil {
			return false, err
		}
		if flagged := e.withCopied(c == 1); flagged != e {
			t.set(i, flagged)
			changed = true
		}
	}
	return changed, nil
}

// sawChange tells whether a guest has changed a table since the build last looked at it.
func (n *generation) sawChange(i int64) bool {
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	return n.dirty[i]
}

// changedTables returns copies of the active tables that guests have changed, and forgets that they have.
func (n *generation) changedTables() (map[int64]table, error) {
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	return n.changedLocked()
}

// changedLocked is changedTables with the image's lock held.
func (n *generation) changedLocked() (map[int64]table, error) {
	ts := make(map[int64]table)
	for i := range n.dirty {
		t, err := n.img.activeTable(i)
		if err != nil {
			return nil, err
		}
		if t != nil && i < n.l1Keep {
			ts[i] = n.g.table(append([]byte(nil), t.data.b...))
		}
	}
	clear(n.dirty)
	return ts, nil
}

// eachTable calls fn for each L2 table of an L1 table with its index, its offset and its content, which fn may change.
// Tables that lie one after the other in the file are read together.
func (img *Image) eachTable(l1 []l1Entry, fn func(index, off int64, t table) error) error {
	length, err := img.f.Size()
	if err != nil {
		return err
	}
	for i := 0; i < len(l1); {
		if l1[i].offset() == 0 {
			i++
			continue
		}
		k := img.neighbours(l1[i:])
		for j := i; j < i+k; j++ {
			if err := img.checkL1Entry(l1[j]); err != nil {
				return fmt.Errorf("L1 entry %d: %w", j, err)
			}
			if l1[j].offset() >= length {
				return fmt.Errorf("%w: L1 entry %d points at %#x, beyond the end of the file", ErrCorrupt, j, l1[j].offset())
			}
		}
		b := make([]byte, int64(k)<<img.g.clusterBits)
		off := l1[i].offset()
		if err := readPadded(img.f, b, off); err != nil {
			return fmt.Errorf("read L2 tables at file offset %#x: %w", off, err)
		}
		for j := range k {
			at := int64(j) << img.g.clusterBits
			if err := fn(int64(i+j), off+at, img.g.table(b[at:at+img.g.clusterSize])); err != nil {
				return err
			}
		}
		i += k
	}
	return nil
}

// neighbours returns how many tables from the first on lie one after the other, as far as one read goes.
func (img *Image) neighbours(l1 []l1Entry) int {
	const most = 1 << 20 // bytes
	k := 1
	for k < len(l1) && int64(k)<<img.g.clusterBits < most && l1[k].offset() == l1[0].offset()+int64(k)<<img.g.clusterBits {
		k++
	}
	return k
}

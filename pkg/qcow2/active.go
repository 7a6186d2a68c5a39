package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// lock takes the guest clusters of c.
func (img *Image) lock(c format.Chunk, exclusive bool) (unlock func()) {
	first, end := c.Guest(img.g)
	r := img.guests.lock(first, end, exclusive)
	return func() { img.guests.unlock(r) }
}

// activeTable returns the active L2 table of an L1 entry, nil if there is none. Called with mu held, which it gives up
// while it reads; the result is valid as long as it is held from then on.
func (img *Image) activeTable(index int64) (*l2Table, error) {
	for {
		if t := img.l2.get(index); t != nil {
			return t, nil
		}
		e := img.l1[index]
		if err := img.checkL1Entry(e); err != nil {
			return nil, fmt.Errorf("%s: active L1 entry %d: %w", img.f.Name(), index, err)
		}
		if e.Offset() == 0 {
			return nil, nil
		}
		if err := img.loadTable(index, e); err != nil {
			return nil, err
		}
	}
}

// loadTable reads a table into the cache, or waits until somebody else has read it. Called with mu held, which it gives up.
func (img *Image) loadTable(index int64, e format.L1Entry) error {
	if img.awaitTable(index) {
		return nil
	}
	t := &l2Table{index: index, offset: e.Offset(), data: img.l2.newTable(img.g)}
	current, err := img.readTable(index, e, t.data)
	if err == nil && current {
		img.l2.put(t)
	}
	return err
}

// awaitTable waits until nobody reads a table any more, if somebody does. Called with mu held, which it gives up then.
func (img *Image) awaitTable(index int64) bool {
	done := img.loading[index]
	if done == nil {
		return false
	}
	img.mu.Unlock()
	<-done
	img.mu.Lock()
	return true
}

// readTable reads the table of an active L1 entry that is not in the cache, and that nobody else reads: with two at it, one might
// bring what the other's guest has changed and written meanwhile. So nobody changes it before it is read. current: the entry still
// is the table's; else the generation was switched, or the table given up. Called with mu held, which it gives up while it reads.
func (img *Image) readTable(index int64, e format.L1Entry, t format.L2Table) (current bool, err error) {
	done := make(chan struct{})
	img.loading[index] = done
	img.mu.Unlock()
	err = t.Read(img.f, e.Offset())
	img.mu.Lock()
	delete(img.loading, index)
	close(done)
	return index < int64(len(img.l1)) && img.l1[index] == e, err
}

// owns tells whether a host cluster that is marked COPIED may be written in place. Called with mu held.
func (img *Image) owns(host format.HostOffset) bool {
	if img.build == nil || !img.build.sharesAll {
		return true
	}
	_, ok := img.build.own[img.g.Cluster(host)]
	return ok
}

// mapped notes for a running operation that entry i of an active table has changed, and what it maps. Called with mu
// held.
func (img *Image) mapped(index, i int64, e format.L2Entry) {
	if img.build == nil {
		return
	}
	img.build.note(index).Add(i * img.g.L2EntrySize() / format.SectorSize)
	if e.Own() {
		img.build.own[img.g.Cluster(e.Offset())] = struct{}{}
	}
}

// entries returns a copy of the checked entries of c. COPIED is set in those that may be written in place.
func (img *Image) entries(c format.Chunk) ([]format.L2Entry, error) {
	es, err := img.mappedEntries(c)
	if es == nil {
		es = make([]format.L2Entry, c.Last-c.First+1)
	}
	return es, err
}

// mappedEntries is entries, or nil if there is no L2 table: a disk may be larger than there is time to look at it all.
func (img *Image) mappedEntries(c format.Chunk) ([]format.L2Entry, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	t, err := img.activeTable(c.Table)
	if err != nil || t == nil {
		return nil, err
	}
	es := make([]format.L2Entry, c.Last-c.First+1)
	for i := range es {
		es[i] = t.data.Entry(c.First + int64(i))
		if err := es[i].Check(img.g, img.version); err != nil {
			return nil, fmt.Errorf("%s: L2 table at file offset %#x, entry %d: %w", img.f.Name(), t.offset, c.First+int64(i), err)
		}
		if es[i].Own() && !img.owns(es[i].Offset()) {
			es[i] = es[i].WithCopied(false)
		}
	}
	return es, nil
}

// ownTable gives the active state an L2 table that it may change in place: a new one, or a copy of one that it
// shares with a snapshot. The table's host blocks are allocated here, so that a later commit does not meet a
// full disk.
func (img *Image) ownTable(index int64) error {
	img.tableMu.Lock()
	defer img.tableMu.Unlock()
	var content format.L2Table
	for {
		old, shared, err := img.sharedTable(index, content)
		if err != nil || !shared {
			return err
		}
		if content.B == nil {
			content = img.g.NewTable()
			continue
		}
		got, err := img.alloc.take(1)
		if err != nil {
			return err
		}
		off := img.g.Offset(got[0].First)
		if _, err := img.f.WriteAt(content.B, int64(off)); err != nil {
			return img.giveBack(got, fmt.Errorf("write a new L2 table: %w", err))
		}
		if img.replaceTable(index, old, &l2Table{index: index, offset: off, data: content}) {
			return nil
		}
		// The generation was switched meanwhile: the copy has the flags of the old one.
		if err := img.giveBack(got, nil); err != nil {
			return err
		}
		content = format.L2Table{}
	}
}

// sharedTable returns the L1 entry of a table, and whether the active state must not change it in place, or has not got it;
// then it is copied, if content has room for it.
func (img *Image) sharedTable(index int64, content format.L2Table) (format.L1Entry, bool, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	t, err := img.activeTable(index)
	e := img.l1[index]
	if err != nil || t != nil && e.Copied() && img.owns(e.Offset()) {
		return e, false, err
	}
	if t != nil {
		copy(content.B, t.data.B)
	}
	return e, true, nil
}

// replaceTable makes t the active table if the L1 entry is still what it was.
func (img *Image) replaceTable(index int64, old format.L1Entry, t *l2Table) bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.l1[index] != old {
		return false
	}
	img.l2.put(t)
	img.l1[index] = format.L1Entry(t.offset) | format.FlagCopied
	img.l1Dirty.Add(index * 8 / format.SectorSize)
	img.alloc.metadata.put(img.g.Cluster(t.offset).Alone(), metadataL2)
	if old.Offset() != 0 {
		img.barrier = true // the copy must be durable before L1 points at it
	}
	if n := img.build; n != nil {
		n.own[img.g.Cluster(t.offset)] = struct{}{}
		n.note(index)
		if n.fixed {
			n.late = append(n.late, lateTable{index, old.Offset(), t.offset})
			return true
		}
	}
	if old.Offset() != 0 {
		img.freed.Add(img.g.Cluster(old.Offset()).Alone())
	}
	return true
}

// setEntries replaces the entries of c, in a table that the active state owns, and queues the clusters that
// they gave up. barrier says that the data must be durable before the new entries are.
func (img *Image) setEntries(c format.Chunk, old, es []format.L2Entry, barrier bool) error {
	t, err := img.lockTable(c.Table, len(es))
	defer img.mu.Unlock()
	if err != nil {
		return err
	}
	for i, e := range es {
		if hosts := old[i].HostClusters(img.g); hosts.N > 0 && old[i].Reference() != e.Reference() {
			if err := img.alloc.metadata.refuse(hosts); err != nil {
				return fmt.Errorf("%s: L2 table at file offset %#x, entry %d: %w", img.f.Name(), t.offset, c.First+int64(i), err)
			}
		}
	}
	if t.dirty.Empty() {
		img.dirty++
	}
	img.redo.note(img.g, img.g.GuestCluster(c.Off), es)
	for i, e := range es {
		if e == old[i] {
			continue
		}
		t.set(c.First+int64(i), e)
		img.mapped(c.Table, c.First+int64(i), e)
		if hosts := old[i].HostClusters(img.g); hosts.N > 0 && old[i].Reference() != e.Reference() {
			img.freed.Add(hosts)
		}
	}
	img.barrier = img.barrier || barrier
	return nil
}

// giveBack releases clusters that were taken and not used, and returns err.
func (img *Image) giveBack(rs format.Runs, err error) error {
	if e := img.alloc.release(rs); e != nil {
		return img.fail(e)
	}
	return err
}

// lockTable takes mu and returns an active table of which n entries can be changed: the redo log has room for them, for a
// commit empties it. mu is held also when it fails.
func (img *Image) lockTable(index int64, n int) (*l2Table, error) {
	for {
		img.mu.Lock()
		t, err := img.activeTable(index)
		if err != nil || img.redo.fits(n) {
			return t, err
		}
		img.mu.Unlock()
		if err := img.commit(); err != nil {
			img.mu.Lock()
			return nil, err
		}
	}
}

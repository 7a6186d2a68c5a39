package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// The end of an operation beside guests, after its build:
//
//	catchUp       what guests have changed meanwhile is written for the next generation, too; sync
//	finish        fixMapping; the last changes, and all tables that point at them; sync
//	              header sector; sync: a crash before this leaves the old state, one after it the new one
//	              adopt: what is in memory follows
//	punchZeroed   what only the old generation used goes back to the file system
//
// Commits and reservations wait for finish, as short as it is; reads and writes in place wait for nothing.
// What guests change from fixMapping on is in memory only, for no commit comes before adopt. adopt puts it on top of the new
// generation, as changes that are still to be committed.

const (
	catchUpRounds = 8
	fewTables     = 16
)

// catchUp writes most of what finish would have to write while guests wait for their flushes: refcount blocks, and
// what guests have changed meanwhile.
func (n *generation) catchUp() error {
	for round := range catchUpRounds {
		n.img.mu.Lock()
		changed := n.changed()
		n.img.mu.Unlock()
		for _, i := range changed {
			n.img.mu.Lock()
			c := n.takeChange(i, n.memory()[:n.g.ClusterSize])
			n.img.mu.Unlock()
			if err := n.apply(c); err != nil {
				return err
			}
			n.pace(n.g.ClusterSize)
		}
		for _, step := range []func() error{n.giveUp, n.placeBlocks, n.writeBlocks, n.out.flush} {
			if err := step(); err != nil {
				return err
			}
		}
		if round == 0 && !n.busy() {
			break // nobody waits for a long sync
		}
		if err := n.img.sync(); err != nil {
			return err
		}
		if len(changed) <= fewTables {
			break
		}
	}
	return nil
}

// finish completes the generation and switches to it: two syncs, and what has changed since catchUp. Commits and
// reservations wait meanwhile; guests' reads and writes go on, to clusters that are reserved.
func (n *generation) finish() error {
	img, a := n.img, n.img.alloc
	img.phases.enter(PhaseWait)
	img.commitMu.Lock()
	defer img.commitMu.Unlock()
	a.ledger.Lock()
	defer a.ledger.Unlock()
	img.phases.enter(PhaseComplete)

	err := n.interrupted()
	if err == nil {
		err = n.complete()
	}
	if err != nil {
		return n.abortLocked(err)
	}
	img.phases.enter(PhaseSync)
	if err := img.sync(); err != nil {
		return err
	}
	img.phases.enter(PhaseSwitch)
	if err := img.switchHeader(func(h *format.Header) {
		n.h.Incompatible = h.Incompatible // guests may have found corruption meanwhile
		*h = n.h
	}); err != nil {
		return err
	}
	img.phases.enter(PhaseAdopt)
	return n.adopt()
}

// complete writes all that is missing.
func (n *generation) complete() error {
	old := n.img.hdr.Load()
	if err := n.giveUp(); err != nil {
		return err
	}
	cs := n.fixMapping()
	for _, c := range cs {
		if err := n.apply(c); err != nil {
			return err
		}
	}
	if err := n.completeL1(); err != nil {
		return err
	}
	rows, err := format.EncodeSnapshotTable(n.row)
	if err != nil {
		return err
	}
	n.h.Snapshots, n.h.SnapshotsOffset = int64(len(n.row)), 0
	if len(n.row) > 0 {
		if n.h.SnapshotsOffset, err = n.place(rows); err != nil {
			return err
		}
	}
	n.h.L1Size = int64(len(n.l1))
	if n.h.L1Offset, err = n.place(format.EncodeL1(n.l1)); err != nil {
		return err
	}
	if err := n.locked(func() error {
		if err := n.drop(old.SnapshotsOffset, n.img.rowBytes); err != nil {
			return err
		}
		return n.drop(old.L1Offset, old.L1Size*8)
	}); err != nil {
		return err
	}
	if err := n.completeRefcounts(); err != nil {
		return err
	}
	return n.out.flush()
}

// fixMapping fixes, in one instant, which mapping the next generation has: it notes the L1 table and returns what is still
// to be written. What guests have given up and not yet committed stays theirs: a table that both generations use has it
// on disk still.
func (n *generation) fixMapping() []tableChange {
	free, size := n.memory(), n.g.ClusterSize
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	n.fixed = true
	if n.replaces = n.l1 != nil; !n.replaces {
		n.l1 = slices.Clone(n.img.l1)
		clear(n.l1[n.l1Keep:])
	}
	var cs []tableChange
	for _, i := range n.changed() {
		if int64(len(free)) < size {
			free = make([]byte, size) // guests are faster than catchUp
		}
		cs = append(cs, n.takeChange(i, free[:size]))
		free = free[size:]
	}
	clear(n.dirty)
	return cs
}

// completeL1 makes the next active L1 table.
func (n *generation) completeL1() error {
	if len(n.l1) == 0 {
		n.l1 = make([]format.L1Entry, 1) // QEMU writes none for an empty disk; a table has a cluster
	}
	for i, e := range n.l1 {
		off := e.Offset()
		switch next := n.tables[int64(i)]; {
		case next != nil:
			n.l1[i] = format.L1Entry(next.at) | format.FlagCopied
		case off == 0:
			n.l1[i] = 0
		case n.replaces:
			if err := n.flagL1(i); err != nil {
				return err
			}
		case n.sharesAll && !n.isOwn(off):
			n.l1[i] = format.L1Entry(off)
		case n.copied[int64(i)] == off:
			n.l1[i] = format.L1Entry(off) | format.FlagCopied
		}
	}
	return nil
}

// flagL1 sets COPIED in an L1 entry by the table's count.
func (n *generation) flagL1(i int) error {
	return n.locked(func() error {
		off := n.l1[i].Offset()
		c, err := n.count(n.g.Cluster(off))
		if n.l1[i] = format.L1Entry(off); c == 1 {
			n.l1[i] |= format.FlagCopied
		}
		return err
	})
}

func (n *generation) isOwn(off format.HostOffset) bool {
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	return n.img.owns(off)
}

// completeRefcounts places what is left of the refcount blocks, and the table, gives up their old clusters, and writes
// them. Each of that changes counts, perhaps in one more block: it goes on until all have a place.
func (n *generation) completeRefcounts() error {
	rc := n.img.alloc.rc
	if err := n.locked(func() error { return n.add(rc.tableAt, -1) }); err != nil {
		return err
	}
	var at format.Run // the table
	for {
		if err := n.placeBlocks(); err != nil {
			return err
		}
		again := false
		if err := n.locked(func() (err error) {
			again, err = n.dropBlocks()
			if need := n.tableClusters(); err == nil && at.N < need {
				again = true
				at, err = n.takeTable(at, need)
			}
			return err
		}); err != nil {
			return err
		}
		if !again {
			break
		}
	}
	if err := n.writeBlocks(); err != nil {
		return err
	}
	// Live blocks that stay are part of the next generation as they are in memory.
	if err := n.img.alloc.writeBack(); err != nil {
		return err
	}
	n.h.RefTableOffset, n.h.RefTableClusters = n.g.Offset(at.First), at.N
	raw := make([]byte, n.g.Bytes(at.N))
	for i, off := range n.refTable() {
		binary.BigEndian.PutUint64(raw[i*8:], uint64(off))
	}
	n.img.alloc.metadata.put(at, metadataSole)
	return n.out.write(n.h.RefTableOffset, raw)
}

// dropBlocks gives up live blocks that have come into being since their next ones were placed. Called with the
// allocator's lock held.
func (n *generation) dropBlocks() (again bool, err error) {
	for k, b := range n.blocks {
		if old := b.old; b.at != 0 && err == nil {
			err = n.dropBlock(k)
			again = again || b.old != old
		}
	}
	return again, err
}

// takeTable takes clusters for the refcount table in place of at. Called with the allocator's lock held.
func (n *generation) takeTable(at format.Run, need int64) (format.Run, error) {
	if at.N > 0 {
		if err := n.add(at, -1); err != nil {
			return format.Run{}, err
		}
	}
	if n.g.Bytes(need) > format.MaxRefcountTableBytes {
		return format.Run{}, fmt.Errorf("%w: the refcount table would exceed %d MiB", ErrLimit, format.MaxRefcountTableBytes>>20)
	}
	return n.take(need)
}

// tableClusters returns how many clusters the refcount table needs: as many as it has, or half as many again as the
// blocks ask for. Called with the allocator's lock held.
func (n *generation) tableClusters() int64 {
	have := n.img.alloc.rc.tableAt.N
	need := have
	for i, b := range n.blocks {
		if b.at != 0 || !b.dirty.Empty() {
			need = max(need, n.g.Clusters((i+1)*8))
		}
	}
	if need > have {
		need = max(need, min(need+need/2+1, format.MaxRefcountTableBytes/n.g.ClusterSize))
	}
	return need
}

// refTable returns the next refcount table.
func (n *generation) refTable() []format.HostOffset {
	table := make([]format.HostOffset, n.g.Bytes(n.h.RefTableClusters)/8)
	copy(table, n.img.alloc.rc.table)
	for i, b := range n.blocks {
		if b.at != 0 {
			table[i] = b.at
		}
	}
	return table
}

// adopt makes the image use what is now the live generation. Called with the locks of finish held.
func (n *generation) adopt() error {
	img, a := n.img, n.img.alloc
	length, err := img.f.Size()
	if err != nil {
		return img.fail(err)
	}
	table := n.refTable()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.build = nil
	a.rc.setTable(table, n.g.RunOf(n.h.RefTableOffset, n.g.Bytes(n.h.RefTableClusters)))
	for _, k := range slices.Sorted(maps.Keys(n.blocks)) {
		b := n.blocks[k]
		switch {
		case b.at == 0:
		case b.counts.None() || b.dirty.Empty() && len(a.rc.blocks) >= a.rc.limit:
			delete(a.rc.blocks, k)
		default:
			a.rc.blocks[k] = &b.refBlock
		}
	}
	a.length.Store(max(a.length.Load(), length))
	a.unsafe, a.unsafeEnd = n.zeroed, a.g.ClusterBehind(a.fileEnd()) // behind the end there is nothing to punch

	img.mu.Lock()
	defer img.mu.Unlock()
	img.build = nil
	img.l1, img.l1Dirty, img.rows, img.rowBytes = n.l1, nil, n.row, n.rowBytes()
	return n.adoptTables()
}

// adoptTables brings the L2 cache up to date, and what guests have changed since fixMapping, which is still to be committed.
func (n *generation) adoptTables() error {
	img, c := n.img, n.img.l2
	if n.replaces {
		c.clear()
		return nil
	}
	for _, l := range n.late {
		n.adoptLate(l)
	}
	for i, e := range c.tables {
		next, t := n.tables[i], e.Value.(*l2Table)
		_, changed := n.dirty[i]
		switch {
		case next == nil:
		case !changed:
			c.drop(i)
		default:
			if err := n.adoptTable(next, t); err != nil {
				return img.fail(err)
			}
		}
	}
	return nil
}

// adoptTable moves a table that guests have changed since fixMapping into the next generation's place for it.
func (n *generation) adoptTable(next *nextTable, t *l2Table) error {
	rs, err := t.data.EntryRuns(n.g, n.img.version, nil)
	if err != nil {
		return err
	}
	if _, err := n.setCopied(t.data, rs); err != nil {
		return err
	}
	t.offset, t.dirty = next.at, n.g.AllSectors()
	n.img.dirty++
	return nil
}

// adoptLate decides what becomes of a table that a guest made after fixMapping. Where the next generation has a table of its
// own, that one is used and the guest's given up; else the guest's takes the place of the one that it was copied from. The barrier
// that replaceTable has asked for is still due: finish has let no commit come between.
func (n *generation) adoptLate(l lateTable) {
	img := n.img
	if n.tables[l.index] != nil {
		img.freed.Add(n.g.Cluster(l.made).Alone())
		return
	}
	if l.old != 0 {
		img.freed.Add(n.g.Cluster(l.old).Alone())
	}
	img.l1[l.index] = format.L1Entry(l.made) | format.FlagCopied
	img.l1Dirty.Add(l.index * 8 / format.SectorSize)
}

// rowBytes returns the length of the snapshot table.
func (n *generation) rowBytes() int64 {
	b, _ := format.EncodeSnapshotTable(n.row) // complete has encoded it before
	return int64(len(b))
}

// abort gives back what the build has written, and returns why it ended. The live generation is as if it had never
// begun.
func (n *generation) abort(cause error) error {
	cause = errors.Join(cause, n.out.wait()) // first: a write may take long
	n.img.commitMu.Lock()
	defer n.img.commitMu.Unlock()
	n.img.alloc.ledger.Lock()
	defer n.img.alloc.ledger.Unlock()
	return n.abortLocked(cause)
}

// abortLocked is abort for who holds its locks.
func (n *generation) abortLocked(cause error) error {
	img, a := n.img, n.img.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	a.build = nil
	img.mu.Lock()
	img.build = nil
	for _, t := range n.late {
		if t.old != 0 {
			img.freed.Add(n.g.Cluster(t.old).Alone())
		}
	}
	img.mu.Unlock()
	cause = errors.Join(fmt.Errorf("%s: %w", img.f.Name(), cause), n.out.wait())
	if img.failed() != nil {
		return cause
	}
	if err := a.releaseLocked(n.deferred); err != nil {
		return errors.Join(cause, img.fail(err))
	}
	if len(n.taken) == 0 {
		return cause
	}
	return errors.Join(cause, a.punch(n.taken), img.f.Truncate(a.length.Load()))
}

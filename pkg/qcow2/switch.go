package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// operation is a change of the metadata's generation: a snapshot created, deleted or gone to, a resize.
type operation struct {
	// begin checks the request and notes what it wants. Guest requests wait for it, all that came before is
	// committed; it reads nothing.
	begin func(n *generation) error
	// build prepares the next generation; it may take long. Guests go on, unless they have to stop.
	build func(n *generation) error
	// stop: guests wait until the operation has ended.
	stop bool
}

// change carries out an operation. If it fails before the header is written nothing has changed; if it fails there
// the image has failed.
func (img *Image) change(op operation) (err error) {
	defer func() { err = img.judge(err) }()
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	if err := img.settleFirst(); err != nil {
		return err
	}
	n, err := img.start(op)
	if err != nil {
		return err
	}
	defer close(n.done)
	if op.stop {
		defer img.gate.Unlock()
	}
	if err := op.build(n); err != nil {
		return n.abort(err)
	}
	if !op.stop {
		if err := n.catchUp(); err != nil {
			return n.abort(err)
		}
	}
	return n.finish()
}

// settleFirst commits, so that start, for which guests stop, has little to commit.
func (img *Image) settleFirst() error {
	if err := img.begin(0, 0, true); err != nil {
		return err
	}
	defer img.end()
	return img.commitMapping()
}

// start stops guests, commits and begins a generation. It keeps them stopped only for an operation that wants it.
func (img *Image) start(op operation) (*generation, error) {
	img.gate.Lock()
	ok := false
	defer func() {
		if !ok || !op.stop {
			img.gate.Unlock()
		}
	}()
	if err := img.usable(true); err != nil {
		return nil, err
	}
	if err := img.commitMapping(); err != nil {
		return nil, err // data may wait for the sync before the switch
	}
	n := img.newGeneration()
	if err := op.begin(n); err != nil {
		return nil, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	ok = true
	img.mu.Lock()
	img.build = n
	img.mu.Unlock()
	img.alloc.mu.Lock()
	img.alloc.build = n
	if img.alloc.search != nil {
		img.alloc.search.disturbed = true
	}
	img.alloc.mu.Unlock()
	return n, nil
}

const (
	catchUpRounds = 8
	fewTables     = 4
)

// catchUp writes most of what finish would have to write while guests wait for their flushes: refcount blocks, and
// tables that guests have changed meanwhile.
func (n *generation) catchUp() error {
	for range catchUpRounds {
		ts, err := n.changedTables()
		if err != nil {
			return err
		}
		for _, i := range slices.Sorted(maps.Keys(ts)) {
			if err := n.locked(func() error { return n.flagTable(i, ts[i]) }); err != nil {
				return err
			}
		}
		if err := n.locked(n.placeBlocks); err != nil {
			return err
		}
		if err := n.locked(n.writeBlocks); err != nil {
			return err
		}
		if err := n.flush(); err != nil {
			return err
		}
		if err := n.img.sync(); err != nil {
			return err
		}
		if len(ts) <= fewTables {
			break
		}
	}
	return nil
}

// finish completes the generation and switches to it. Commits and allocations wait meanwhile: for two syncs and what
// has changed since catchUp.
func (n *generation) finish() error {
	img, a := n.img, n.img.alloc
	img.commitMu.Lock()
	defer img.commitMu.Unlock()
	img.tableMu.Lock()
	defer img.tableMu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()

	err := n.interrupted()
	if err == nil {
		err = n.complete()
	}
	if err != nil {
		return n.abortLocked(err)
	}
	if err := img.sync(); err != nil {
		return err
	}
	if err := img.switchHeader(func(h *header) {
		n.h.incompatible = h.incompatible // guests may have found corruption meanwhile
		*h = n.h
	}); err != nil {
		return err
	}
	return n.adopt()
}

// complete writes all that is missing.
func (n *generation) complete() error {
	old := n.img.hdr.Load()
	ts, err := n.settleMapping()
	if err != nil {
		return err
	}
	for _, i := range slices.Sorted(maps.Keys(ts)) {
		if err := n.flagTable(i, ts[i]); err != nil {
			return err
		}
	}
	if err := n.completeL1(); err != nil {
		return err
	}
	rows, err := encodeSnapshotTable(n.row)
	if err != nil {
		return err
	}
	n.h.snapshots, n.h.snapshotsOffset = int64(len(n.row)), 0
	if len(n.row) > 0 {
		if n.h.snapshotsOffset, err = n.place(rows); err != nil {
			return err
		}
	}
	n.h.l1Size = int64(len(n.l1))
	if n.h.l1Offset, err = n.place(encodeL1(n.l1)); err != nil {
		return err
	}
	if err := n.drop(old.snapshotsOffset, n.img.rowBytes); err != nil {
		return err
	}
	if err := n.drop(old.l1Offset, old.l1Size*8); err != nil {
		return err
	}
	if err := n.completeRefcounts(); err != nil {
		return err
	}
	return n.flush()
}

// settleMapping settles, in one instant, which mapping the next generation has: it returns the tables that are still
// to be written, and notes the L1 table. What guests have given up and not yet committed stays theirs: a table that both
// generations use has it on disk still.
func (n *generation) settleMapping() (map[int64]table, error) {
	n.img.mu.Lock()
	defer n.img.mu.Unlock()
	if n.replaces = n.l1 != nil; !n.replaces {
		n.l1 = slices.Clone(n.img.l1)
		clear(n.l1[n.l1Keep:])
	}
	return n.changedLocked()
}

// completeL1 makes the next active L1 table, and gives up what guests have given up durably.
func (n *generation) completeL1() error {
	if len(n.l1) == 0 {
		n.l1 = make([]l1Entry, 1) // QEMU writes none for an empty disk; a table has a cluster
	}
	for _, r := range n.deferred {
		if err := n.add(r, -1); err != nil {
			return err
		}
	}
	for i, off := range n.tables {
		if err := n.drop(n.l1[i].offset(), n.g.clusterSize); err != nil {
			return err
		}
		n.l1[i] = l1Entry(off)
	}
	for i, e := range n.l1 {
		off := e.offset()
		if off == 0 {
			continue
		}
		c, err := n.count(off >> n.g.clusterBits)
		if err != nil {
			return err
		}
		if n.l1[i] = l1Entry(off); c == 1 {
			n.l1[i] |= flagCopied
		}
	}
	return nil
}

// placeBlocks gives each changed refcount block a place, which changes counts, perhaps in one more block.
func (n *generation) placeBlocks() error {
	for again := true; again; {
		again = false
		for _, i := range slices.Sorted(maps.Keys(n.blocks)) {
			if n.blocks[i].at != 0 {
				continue
			}
			r, err := n.take(1)
			if err != nil {
				return err
			}
			n.blocks[i].at = r.first << n.g.clusterBits
			again = true
		}
	}
	return nil
}

func (n *generation) writeBlocks() error {
	for _, i := range slices.Sorted(maps.Keys(n.blocks)) {
		b := n.blocks[i]
		if !b.dirty {
			continue
		}
		if err := n.write(run{b.at >> n.g.clusterBits, 1}, b.counts.b); err != nil {
			return err
		}
		b.dirty = false
	}
	return nil
}

// completeRefcounts places what is left of the refcount blocks, and the table, gives up their old clusters, and writes
// them. Each of that changes counts, perhaps in one more block: it goes on until all have a place.
func (n *generation) completeRefcounts() error {
	rc := n.img.alloc.rc
	if err := n.drop(rc.tableAt.first<<n.g.clusterBits, rc.tableAt.n<<n.g.clusterBits); err != nil {
		return err
	}
	dropped := make(map[int64]bool)
	var at run // the table
	for again := true; again; {
		again = false
		if err := n.placeBlocks(); err != nil {
			return err
		}
		for _, i := range slices.Sorted(maps.Keys(n.blocks)) {
			if dropped[i] {
				continue
			}
			dropped[i], again = true, true
			if i < int64(len(rc.table)) && rc.table[i] != 0 {
				if err := n.drop(rc.table[i], n.g.clusterSize); err != nil {
					return err
				}
			}
		}
		if need := n.tableClusters(); at.n < need {
			again = true
			if at.n > 0 {
				if err := n.add(at, -1); err != nil {
					return err
				}
			}
			if need<<n.g.clusterBits > maxRefcountTableBytes {
				return fmt.Errorf("%w: the refcount table would exceed %d MiB", ErrLimit, maxRefcountTableBytes>>20)
			}
			var err error
			if at, err = n.take(need); err != nil {
				return err
			}
		}
	}
	if err := n.writeBlocks(); err != nil {
		return err
	}
	// Live blocks that stay are part of the next generation as they are in memory.
	if err := rc.writeBack(); err != nil {
		return err
	}
	n.h.refTableOffset, n.h.refTableClusters = at.first<<n.g.clusterBits, at.n
	raw := make([]byte, at.n<<n.g.clusterBits)
	for i, off := range n.refTable() {
		binary.BigEndian.PutUint64(raw[i*8:], uint64(off))
	}
	return n.write(at, raw)
}

// tableClusters returns how many clusters the refcount table needs: as many as it has, or half as many again as the
// blocks ask for.
func (n *generation) tableClusters() int64 {
	have := n.img.alloc.rc.tableAt.n
	need := have
	for i := range n.blocks {
		need = max(need, n.g.clusters((i+1)*8))
	}
	if need > have {
		need = max(need, min(need+need/2+1, maxRefcountTableBytes>>n.g.clusterBits))
	}
	return need
}

// refTable returns the next refcount table.
func (n *generation) refTable() []int64 {
	table := make([]int64, n.h.refTableClusters<<n.g.clusterBits/8)
	copy(table, n.img.alloc.rc.table)
	for i, b := range n.blocks {
		table[i] = b.at
	}
	return table
}

// adopt makes the image use what is now the live generation. Called with the locks of finish held.
func (n *generation) adopt() error {
	img, a := n.img, n.img.alloc
	table := n.refTable()
	a.build = nil
	a.rc.setTable(table, run{n.h.refTableOffset >> n.g.clusterBits, n.h.refTableClusters})
	for i, b := range n.blocks {
		delete(a.rc.blocks, i)
		a.rc.keep(i, &refBlock{counts: b.counts})
	}
	for _, off := range n.tables {
		a.metadata.put(run{off >> n.g.clusterBits, 1}, metadataL2)
	}
	for _, r := range n.wrote {
		a.length.Store(max(a.length.Load(), r.end()<<n.g.clusterBits))
	}

	img.mu.Lock()
	defer img.mu.Unlock()
	img.build = nil
	img.l1, img.l1Dirty, img.rows, img.rowBytes = n.l1, nil, n.row, n.rowBytes()
	if err := n.adoptTables(); err != nil {
		return img.fail(err)
	}
	// An error here costs host blocks only: a free cluster is punched again before it is handed out.
	_ = a.punch(n.unused())
	return nil
}

// adoptTables brings the L2 cache up to date. What guests have changed since complete looked is still to be committed.
func (n *generation) adoptTables() error {
	c := n.img.l2
	if n.replaces {
		c.clear()
		return nil
	}
	for i, off := range n.tables {
		t := c.get(i)
		switch {
		case t == nil:
		case !n.dirty[i]:
			c.drop(i)
		default:
			if _, err := n.setCopied(t.data); err != nil {
				return err
			}
			t.offset, t.dirty = off, n.g.allSectors()
			n.img.dirty++
		}
	}
	return nil
}

// rowBytes returns the length of the snapshot table.
func (n *generation) rowBytes() int64 {
	b, _ := encodeSnapshotTable(n.row) // complete has encoded it before
	return int64(len(b))
}

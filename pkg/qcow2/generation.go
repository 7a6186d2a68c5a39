package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// generation builds the next generation of the metadata beside the live one (C3). All that it writes goes to
// clusters whose live count is 0; commit makes it the live one by one header write. Until then a crash, or
// abort, leaves the old generation untouched; afterwards what only the old one used is punched and free.
//
// Guest requests are stopped meanwhile: the image's gate is held, and everything is committed.
type generation struct {
	img *Image
	g   geometry
	h   header        // the next header
	l1  []l1Entry     // the next active L1 table
	row []snapshotRow // the next snapshot table

	table  []int64          // the next refcount table: offset of each block, 0 = none
	blocks map[int64]counts // refcount blocks that differ from the live ones
	next   int64            // search for free clusters from here
	wrote  runs             // for abort
	freed  runs             // clusters whose count fell to 0, and perhaps rose again
}

// newGeneration starts with a copy of the live one.
func (img *Image) newGeneration() *generation {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	l1 := slices.Clone(img.l1)
	if len(l1) == 0 {
		l1 = make([]l1Entry, 1) // QEMU writes none for an empty disk; a table has a cluster
	}
	return &generation{
		img: img, g: img.g, h: *img.hdr.Load(), l1: l1, row: slices.Clone(img.rows),
		table:  slices.Clone(img.alloc.rc.table),
		blocks: make(map[int64]counts), next: img.alloc.next,
	}
}

// block returns the next counts of refcount block i, to read; none if all are 0.
func (n *generation) block(i int64) (counts, error) {
	if b, ok := n.blocks[i]; ok {
		return b, nil
	}
	b, err := n.img.alloc.rc.block(i)
	if b == nil {
		return counts{}, err
	}
	return b.counts, nil
}

// ownBlock returns block i to change.
func (n *generation) ownBlock(i int64) (counts, error) {
	if b, ok := n.blocks[i]; ok {
		return b, nil
	}
	if i >= maxRefcountTableBytes/8 {
		return counts{}, fmt.Errorf("%w: refcount block %d; the refcount table would exceed %d MiB", ErrLimit, i, maxRefcountTableBytes>>20)
	}
	live, err := n.block(i)
	if err != nil {
		return counts{}, err
	}
	b := n.g.newCounts(1)
	copy(b.b, live.b)
	n.blocks[i] = b
	for i >= int64(len(n.table)) {
		n.table = append(n.table, 0)
	}
	return b, nil
}

// count returns a cluster's next count.
func (n *generation) count(c int64) (uint64, error) {
	b, err := n.block(c >> n.g.blockBits)
	if b.none() {
		return 0, err
	}
	return b.get(c & (n.g.blockCounts - 1)), nil
}

// add changes the counts of a run.
func (n *generation) add(r run, delta int) error {
	return n.g.eachBlock(r, func(k, i, m int64) error {
		b, err := n.ownBlock(k)
		if err != nil {
			return err
		}
		if err := b.add(i, m, delta); err != nil {
			return fmt.Errorf("refcount block %d: %w", k, err)
		}
		for j := i; delta < 0 && j < i+m; j++ {
			if b.get(j) == 0 {
				n.freed.add(run{k<<n.g.blockBits + j, 1})
			}
		}
		return nil
	})
}

// take allocates k neighbouring clusters for the next generation.
func (n *generation) take(k int64) (run, error) {
	r := run{first: n.next}
	for r.n < k {
		c, err := n.img.alloc.rc.nextFree(r.end())
		if err != nil {
			return run{}, err
		}
		if v, err := n.count(c); err != nil {
			return run{}, err
		} else if v != 0 {
			r = run{first: c + 1}
			continue
		}
		if c != r.end() {
			r = run{first: c}
		}
		r.n++
	}
	if err := n.img.alloc.check(r); err != nil {
		return run{}, err
	}
	n.next = r.end()
	return r, n.add(r, 1)
}

// write puts b into clusters of the next generation, padded to whole ones.
func (n *generation) write(r run, b []byte) error {
	if pad := r.n<<n.g.clusterBits - int64(len(b)); pad > 0 {
		b = append(b[:len(b):len(b)], make([]byte, pad)...)
	}
	n.wrote.add(r)
	if _, err := n.img.f.WriteAt(b, r.first<<n.g.clusterBits); err != nil {
		return fmt.Errorf("write metadata: %w", err)
	}
	return nil
}

// place takes clusters for b, writes it and returns its offset.
func (n *generation) place(b []byte) (int64, error) {
	r, err := n.take(max(n.g.clusters(int64(len(b))), 1))
	if err != nil {
		return 0, err
	}
	return r.first << n.g.clusterBits, n.write(r, b)
}

// dropBytes gives up the clusters of a structure of the old generation.
func (n *generation) dropBytes(off, length int64) error {
	return n.add(run{off >> n.g.clusterBits, n.g.clusters(length)}, -1)
}

// reference changes the counts of all that an L1 table reaches: its L2 tables and their clusters, once per path.
func (n *generation) reference(l1 []l1Entry, delta int) error {
	return n.img.eachTable(l1, func(_ int64, off int64, t table) error {
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
		for _, r := range rs {
			if err := n.add(r, delta); err != nil {
				return fmt.Errorf("L2 table at file offset %#x: %w", off, err)
			}
		}
		return nil
	})
}

// flag makes the COPIED flags of the active state agree with the next counts (I2). A table in which a flag changes
// is written anew; the old one stays as it is, for a snapshot or for the old generation.
func (n *generation) flag() error {
	return n.img.eachTable(n.l1, func(i int64, off int64, t table) error {
		changed, err := n.setCopied(t)
		if err != nil {
			return err
		}
		if changed {
			if err := n.add(run{off >> n.g.clusterBits, 1}, -1); err != nil {
				return err
			}
			if off, err = n.place(t.b); err != nil {
				return err
			}
		}
		c, err := n.count(off >> n.g.clusterBits)
		n.l1[i] = l1Entry(off)
		if c == 1 {
			n.l1[i] |= flagCopied
		}
		return err
	})
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
		flagged := e.withCopied(c == 1)
		if flagged != e {
			t.set(i, flagged)
			changed = true
		}
	}
	return changed, nil
}

// commit writes what is not yet written and switches. It returns the error of the build, after which nothing has
// changed, or that of the switch, after which the image has failed.
func (n *generation) commit() error {
	if err := n.build(); err != nil {
		return n.abort(err)
	}
	if err := n.img.sync(); err != nil {
		return err
	}
	if err := n.img.switchHeader(func(h *header) { *h = n.h }); err != nil {
		return err
	}
	n.adopt()
	return nil
}

func (n *generation) build() error {
	old := n.img.hdr.Load()
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
	if err := n.dropBytes(old.snapshotsOffset, n.img.rowBytes); err != nil {
		return err
	}
	if err := n.dropBytes(old.l1Offset, old.l1Size*8); err != nil {
		return err
	}
	return n.buildRefcounts()
}

// buildRefcounts places the changed refcount blocks and the table. Each cluster that they take or give up changes
// a count, perhaps in one more block: it goes on until no block is left without a place.
func (n *generation) buildRefcounts() error {
	rc := n.img.alloc.rc
	placed := make(map[int64]bool)
	var at run // the table
	for {
		for _, i := range slices.Sorted(maps.Keys(n.blocks)) {
			if placed[i] {
				continue
			}
			placed[i] = true
			r, err := n.take(1)
			if err != nil {
				return err
			}
			if old := n.table[i]; old != 0 {
				if err := n.dropBytes(old, n.g.clusterSize); err != nil {
					return err
				}
			}
			n.table[i] = r.first << n.g.clusterBits
		}
		if len(placed) < len(n.blocks) {
			continue
		}
		if need := n.g.clusters(int64(len(n.table)) * 8); at.n < need {
			give, size := at, need
			if at.n == 0 {
				give = rc.tableAt
			}
			if size > rc.tableAt.n {
				size += size/2 + 1
			}
			if size = min(size, maxRefcountTableBytes>>n.g.clusterBits); size < need {
				return fmt.Errorf("%w: the refcount table would exceed %d MiB", ErrLimit, maxRefcountTableBytes>>20)
			}
			var err error
			if at, err = n.take(size); err != nil {
				return err
			}
			if err := n.add(give, -1); err != nil {
				return err
			}
		}
		if len(placed) == len(n.blocks) && at.n<<n.g.clusterBits >= int64(len(n.table))*8 {
			break
		}
	}
	for i, b := range n.blocks {
		if err := n.write(run{n.table[i] >> n.g.clusterBits, 1}, b.b); err != nil {
			return err
		}
	}
	n.table = append(n.table, make([]int64, at.n<<n.g.clusterBits/8-int64(len(n.table)))...)
	raw := make([]byte, len(n.table)*8)
	for i, off := range n.table {
		binary.BigEndian.PutUint64(raw[i*8:], uint64(off))
	}
	n.h.refTableOffset, n.h.refTableClusters = at.first<<n.g.clusterBits, at.n
	return n.write(at, raw)
}

// abort gives back what the build has written, and returns why it ended.
func (n *generation) abort(cause error) error {
	cause = fmt.Errorf("%s: %w", n.img.f.Name(), cause)
	if len(n.wrote) == 0 {
		return cause
	}
	a := n.img.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.punch(n.wrote)
	if err == nil {
		err = n.img.f.Truncate(a.length.Load())
	}
	return errors.Join(cause, err)
}

// adopt makes the image use what is now the live generation.
func (n *generation) adopt() {
	img, a := n.img, n.img.alloc
	img.mu.Lock()
	defer img.mu.Unlock()
	img.l1, img.l1Dirty, img.rows, img.rowBytes = n.l1, nil, n.row, n.rowBytes()
	img.l2.clear()

	a.mu.Lock()
	defer a.mu.Unlock()
	a.rc.setTable(n.table, run{n.h.refTableOffset >> n.g.clusterBits, n.h.refTableClusters})
	for i, b := range n.blocks {
		delete(a.rc.blocks, i)
		a.rc.keep(i, &refBlock{counts: b})
	}
	for _, r := range n.wrote {
		a.length.Store(max(a.length.Load(), r.end()<<n.g.clusterBits))
	}
	// An error here costs host blocks only: a free cluster is punched again before it is handed out.
	_ = a.punch(n.unused())
}

// unused returns the clusters that no longer have a count.
func (n *generation) unused() runs {
	var rs runs
	for _, r := range n.freed {
		for c := r.first; c < r.end(); c++ {
			if b := n.blocks[c>>n.g.blockBits]; b.get(c&(n.g.blockCounts-1)) == 0 {
				rs.add(run{c, 1})
			}
		}
	}
	return rs
}

// rowBytes returns the length of the snapshot table.
func (n *generation) rowBytes() int64 {
	b, _ := encodeSnapshotTable(n.row) // build has encoded it before
	return int64(len(b))
}

// eachTable calls fn for each L2 table of an L1 table with its index, its offset and its content, which fn may change.
// Tables that lie one after the other in the file are read together.
func (img *Image) eachTable(l1 []l1Entry, fn func(index, off int64, t table) error) error {
	length, err := img.f.Size()
	if err != nil {
		return err
	}
	const most = 1 << 20 // bytes a read
	for i := 0; i < len(l1); {
		if l1[i].offset() == 0 {
			i++
			continue
		}
		k := 1
		for i+k < len(l1) && l1[i+k].offset() == l1[i].offset()+int64(k)<<img.g.clusterBits && int64(k)<<img.g.clusterBits < most {
			k++
		}
		for j := i; j < i+k; j++ {
			if err := l1[j].check(img.g); err != nil {
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

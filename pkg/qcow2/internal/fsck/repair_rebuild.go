package fsck

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// rebuild with lossless set fails with ErrCorrupt, and changes nothing, where a reference would have to be given up.
func (r *repairer) rebuild(h format.Header, lossless bool) error {
	c, err := newChecker(r.stop, r.f, h, nil)
	if err != nil {
		return err
	}
	b := &rebuild{checker: c, r: r, moved: make(map[format.HostOffset]format.HostOffset)}
	b.first = c.end + 1 // a reference may begin in the last, partial cluster and end in the next
	b.next = b.first
	lost := r.result.Lost
	for _, step := range []func() error{
		b.markHeader, func() error { return b.salvageRows(lossless) }, b.mendL1Tables, b.mendL2Tables,
		func() error {
			if lossless && r.result.Lost > lost {
				return fmt.Errorf("%w: references lead nowhere; %w", format.ErrCorrupt, ErrNeedsRepair)
			}
			return nil
		},
		b.flagL2Tables, b.placeL2Tables, b.placeL1Tables, b.placeBitmaps, b.placeRows, b.writeRefcounts,
	} {
		if err := cmp.Or(step(), b.failure); err != nil {
			return err
		}
	}
	b.h.Incompatible &^= format.IncompatDirty | format.IncompatCorrupt
	return r.switchHeader(*b.h)
}

// salvageRows reads the snapshot table as far as it goes.
func (b *rebuild) salvageRows(lossless bool) error {
	if err := b.h.CheckL1Table(); err != nil {
		return err
	}
	b.l1 = append(b.l1, l1Region{offset: b.h.L1Offset, entries: b.h.L1Size, from: origin{use: useL1}})
	if b.behindEnd(b.l1[0]) && (lossless || !b.r.isAllKnown()) {
		return fmt.Errorf("%w: the active L1 table, %d entries at offset %#x, is behind the end of the file: nothing tells where the disk is",
			format.ErrCorrupt, b.h.L1Size, b.h.L1Offset)
	}
	if b.h.Snapshots == 0 {
		return nil
	}
	var rows []format.SnapshotRow
	err := b.h.CheckSnapshotTable()
	if err == nil {
		t := format.NewSnapshotReader(b.file, b.h)
		t.Shorten = true
		rows, _, err = t.Rows(b.h)
	}
	if err != nil && !isDamage(err) {
		return err
	}
	if n := b.h.Snapshots - int64(len(rows)); n > 0 {
		b.rowsChanged = true
		b.r.lose("the last %d rows of the snapshot table were cut off: %v", n, cmp.Or(err, format.ErrLimit))
	}
	for i := range rows {
		b.salvageRow(i, &rows[i])
	}
	return nil
}

// salvageRow keeps a row that can be used.
func (b *rebuild) salvageRow(i int, row *format.SnapshotRow) {
	what := fmt.Sprintf("snapshot table row %d (id %.40q, name %.80q)", i, row.ID, row.Name)
	switch {
	case row.ExtraSize > format.MaxSnapshotExtraBytes:
		b.rowsChanged = true
		b.r.note("%s: %d bytes of extra data were cut to %d", what, row.ExtraSize, format.MaxSnapshotExtraBytes)
	case b.h.Version >= 3 && row.ExtraSize < 16:
		b.rowsChanged = true
		b.r.note("%s: %d bytes of extra data were completed", what, row.ExtraSize)
	}
	if row.DiskSize < 0 || b.g.L1Entries(row.DiskSize) > format.MaxL1Bytes/8 {
		b.rowsChanged = true
		b.r.note("%s: a disk of %d bytes became that of the active one", what, uint64(row.DiskSize))
		row.DiskSize = b.h.Size
	}
	err := row.Check(b.g)
	if err == nil && b.behindEnd(l1Region{offset: row.L1Offset, entries: row.L1Size}) {
		err = fmt.Errorf("%w: L1 table at offset %#x, behind the end of the file", format.ErrCorrupt, row.L1Offset)
	}
	if err != nil {
		b.rowsChanged = true
		b.r.lose("%s was removed: %v", what, err)
		return
	}
	b.l1 = append(b.l1, l1Region{
		offset: row.L1Offset, entries: row.L1Size,
		from: origin{use: useSnapshotL1, table: row.L1Offset, index: int64(len(b.rows))},
	})
	b.rows = append(b.rows, *row)
}

// placeL2Tables gives each L2 table a place of its own.
func (b *rebuild) placeL2Tables() error {
	for _, l2 := range b.l2 {
		at, moved := b.moved[l2.offset]
		if !moved && b.occupy(useL2, l2.offset, b.g.ClusterSize, l2.times) {
			continue
		}
		if !moved {
			t := b.g.NewTable()
			err := format.ReadPadded(b.file, t.B, l2.offset)
			if err == nil {
				at, err = b.write(useL2, t.B)
			}
			if err != nil {
				return err
			}
			b.moved[l2.offset] = at
			b.r.note("the L2 table at %#x moved to %#x: its cluster holds data, too", l2.offset, at)
		}
		b.occupy(useL2, at, b.g.ClusterSize, l2.times)
	}
	return nil
}

// placeL1Tables makes the L1 tables point at where the L2 tables are now.
func (b *rebuild) placeL1Tables() error {
	for _, l1 := range b.l1 {
		raw := make([]byte, l1.entries*8)
		if err := format.ReadPadded(b.file, raw, l1.offset); err != nil {
			return err
		}
		es := format.DecodeL1(raw)
		changed := b.repoint(es, l1.from.use == useL1)
		at := l1.offset
		var err error
		switch fits := l1.entries == 0 || b.isNew(at) || b.occupy(l1.from.use, at, l1.entries*8, 1); {
		case b.isNew(at):
			_, err = b.file.WriteAt(format.EncodeL1(es), int64(at))
			b.occupy(l1.from.use, at, l1.entries*8, 1)
		case changed || !fits:
			if fits {
				b.vacate(at, l1.entries*8)
			}
			at, err = b.write(l1.from.use, format.EncodeL1(es))
			b.occupy(l1.from.use, at, l1.entries*8, 1)
		}
		if err != nil {
			return err
		}
		if l1.from.use == useL1 {
			b.h.L1Offset = at
		} else if row := &b.rows[l1.from.index]; row.L1Offset != at {
			row.L1Offset, b.rowsChanged = at, true
		}
	}
	return nil
}

// repoint follows L2 tables that have moved, and in the active L1 table sets COPIED as it must be.
func (b *rebuild) repoint(es []format.L1Entry, active bool) (changed bool) {
	for i, e := range es {
		if e.Offset() == 0 {
			continue
		}
		if at, ok := b.moved[e.Offset()]; ok {
			e = e&format.FlagCopied | format.L1Entry(at)
		}
		if active {
			k, j := b.group(b.g.Cluster(e.Offset()))
			if e &^= format.FlagCopied; k.refs.get(j) == 1 {
				e |= format.FlagCopied
			}
		}
		changed = changed || e != es[i]
		es[i] = e
	}
	return changed
}

// placeBitmaps counts the clusters of dirty bitmaps. Should anything be wrong with them, they are given up: so does QEMU
// with bitmaps that are not marked as consistent.
func (b *rebuild) placeBitmaps() error {
	alone, err := newChecker(b.stop, b.file, *b.h, nil)
	if err == nil {
		err = alone.markHeader()
	}
	if err == nil {
		err = alone.markBitmaps()
	}
	if err != nil {
		return err
	}
	alone.vacate(0, b.g.ClusterSize)
	if alone.result.Corruptions > 0 || b.meets(alone) {
		b.h.Autoclear &^= format.AutoclearBitmaps
		b.r.note("the dirty bitmaps are damaged: they are no longer marked as consistent")
		return nil
	}
	for k := range alone.inOrder() {
		for i := range int64(groupClusters) {
			if k.refs.get(i) != 0 {
				b.occupy(k.use(i), b.g.Offset(k.at(i)), b.g.ClusterSize, 1)
			}
		}
	}
	return nil
}

// meets tells whether a cluster that other references is in use.
func (b *rebuild) meets(other *checker) bool {
	for k := range other.inOrder() {
		for i := range int64(groupClusters) {
			if mine, j := b.group(k.at(i)); k.refs.get(i) != 0 && mine.refs.get(j) != 0 {
				return true
			}
		}
	}
	return false
}

// placeRows writes the snapshot table again if it changed, or shares its place with something else.
func (b *rebuild) placeRows() error {
	table, err := format.EncodeSnapshotTable(b.rows)
	if err != nil {
		return err
	}
	n := int64(len(table))
	switch {
	case n == 0:
		b.h.Snapshots, b.h.SnapshotsOffset = 0, 0
	case b.rowsChanged || !b.occupy(useSnapshotTable, b.h.SnapshotsOffset, n, 1):
		at, err := b.write(useSnapshotTable, table)
		if err != nil {
			return err
		}
		b.occupy(useSnapshotTable, at, n, 1)
		b.h.Snapshots, b.h.SnapshotsOffset = int64(len(b.rows)), at
	}
	return nil
}

// writeRefcounts writes a new refcount table with all its blocks behind all else.
func (b *rebuild) writeRefcounts() error {
	all := format.Run{First: b.next}
	blocks := b.usedBlocks()
	for again := true; again; {
		indexes := slices.Sorted(maps.Keys(blocks))
		var entries int64
		if len(indexes) > 0 {
			entries = indexes[len(indexes)-1] + 1
		}
		b.h.RefTableClusters = b.g.Clusters(entries * 8)
		if entries*8 > format.MaxRefcountTableBytes {
			return fmt.Errorf("%w: the refcount table would exceed %d MiB", format.ErrLimit, format.MaxRefcountTableBytes>>20)
		}
		need := int64(len(blocks)) + b.h.RefTableClusters
		again = need != all.N
		all.N = need
		for k := range b.g.BlocksOf(all) {
			blocks[k] = true
		}
		again = again || int64(len(blocks))+b.h.RefTableClusters != all.N
	}
	b.occupy(useRefcountBlock, b.g.Offset(all.First), b.g.Bytes(all.N), 1)
	table := make([]byte, b.g.Bytes(b.h.RefTableClusters))
	for _, index := range slices.Sorted(maps.Keys(blocks)) {
		at, err := b.write(useRefcountBlock, b.countsOf(index).B)
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint64(table[index*8:], uint64(at))
	}
	at, err := b.write(useRefcountTable, table)
	b.h.RefTableOffset = at
	b.r.note("the refcount table and its blocks were written anew, at %#x", b.g.Offset(all.First))
	return err
}

// usedBlocks returns the indexes of the refcount blocks that count anything.
func (b *rebuild) usedBlocks() map[int64]bool {
	blocks := make(map[int64]bool)
	for k := range b.inOrder() {
		for i := range int64(groupClusters) {
			if k.refs.get(i) != 0 {
				blocks[b.g.BlockOf(k.at(i))] = true
			}
		}
	}
	return blocks
}

// countsOf returns the content of a refcount block.
func (b *rebuild) countsOf(index int64) format.Counts {
	block := b.g.NewCounts(1)
	for i := range b.g.BlockCounts {
		if k, j := b.group(b.g.Counted(index, i)); k.refs.get(j) != 0 {
			block.Set(i, k.refs.get(j))
		}
	}
	return block
}

package qcow2

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// refcounts is the live refcount table and its blocks, loaded on demand. The allocator guards it.
type refcounts struct {
	f       File
	g       format.Geometry
	table   []format.HostOffset // of each refcount block, 0 = none; as many as the table has room for
	tableAt format.Run          // host clusters of the table
	blocks  map[int64]*refBlock
	limit   int    // clean blocks kept in memory, and about as many dirty ones
	tidyAt  int    // with so many blocks in memory clean ones are looked for
	clock   uint64 // of refBlock.used
}

// refBlock is a refcount block in memory.
type refBlock struct {
	counts  format.Counts
	dirty   format.SectorSet
	writing bool   // its dirty sectors were taken and are not yet written
	used    uint64 // the later, the larger
}

// add changes n counts from index i on, see counts.add.
func (b *refBlock) add(i, n int64, delta int) (format.Fallen, error) {
	fell, err := b.counts.Add(i, n, delta)
	if err == nil {
		b.dirty.AddRange(b.counts.At(i), b.counts.At(i+n-1)+1)
	}
	return fell, err
}

// refBlockCacheBytes bounds the clean refcount blocks in memory, and about the dirty ones: 8 MiB count 256 GiB of 64 KiB clusters.
const refBlockCacheBytes = 8 << 20

func loadRefcounts(f File, g format.Geometry, h *format.Header) (*refcounts, error) {
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, g.Bytes(h.RefTableClusters))
	end := g.Offset(g.ClusterBehind(format.HostOffset(length)))
	if h.RefTableOffset.Plus(int64(len(b))) > end {
		return nil, fmt.Errorf("%w: the refcount table, %d bytes at file offset %#x, reaches beyond the end of the file", ErrCorrupt, len(b), h.RefTableOffset)
	}
	if err := format.ReadPadded(f, b, h.RefTableOffset); err != nil {
		return nil, fmt.Errorf("read the refcount table: %w", err)
	}
	rc := &refcounts{f: f, g: g, blocks: make(map[int64]*refBlock), limit: int(max(refBlockCacheBytes/g.ClusterSize, 4))}
	table := make([]format.HostOffset, len(b)/8)
	for i := range table {
		e := binary.BigEndian.Uint64(b[i*8:])
		if e >= format.MaxHostOffset || !g.Aligned(format.HostOffset(e)) || format.HostOffset(e) >= end {
			return nil, fmt.Errorf("%s: %w: refcount table entry %d (file offset %#x) is %#x",
				f.Name(), ErrCorrupt, i, h.RefTableOffset.Plus(int64(i)*8), e)
		}
		table[i] = format.HostOffset(e)
	}
	rc.setTable(table, g.RunOf(h.RefTableOffset, int64(len(b))))
	return rc, nil
}

// block returns refcount block i, nil if the table has none: all its counts are 0.
func (rc *refcounts) block(i int64) (*refBlock, error) {
	off, ok := rc.absent(i)
	if !ok {
		b := rc.blocks[i]
		if b != nil {
			rc.touch(b)
		}
		return b, nil
	}
	b, err := rc.read(i, off)
	if err == nil {
		rc.keep(i, b)
	}
	return b, err
}

// absent tells whether there is a block i that is not in memory, and where it lies.
func (rc *refcounts) absent(i int64) (off format.HostOffset, ok bool) {
	if i >= int64(len(rc.table)) || rc.table[i] == 0 || rc.blocks[i] != nil {
		return 0, false
	}
	return rc.table[i], true
}

// read reads block i at off. It needs no lock.
func (rc *refcounts) read(i int64, off format.HostOffset) (*refBlock, error) {
	b := &refBlock{counts: rc.g.NewCounts(1)}
	if err := format.ReadPadded(rc.f, b.counts.B, off); err != nil {
		return nil, fmt.Errorf("read refcount block %d: %w", i, err)
	}
	return b, nil
}

// keep caches a block.
func (rc *refcounts) keep(i int64, b *refBlock) {
	if len(rc.blocks) >= max(rc.tidyAt, rc.limit) {
		rc.dropClean(rc.limit - max(rc.limit/4, 1))
	}
	rc.blocks[i] = b
	rc.touch(b)
}

// dropClean lets so many clean blocks stay in memory: those that were used last.
func (rc *refcounts) dropClean(stay int) {
	defer func() { rc.tidyAt = len(rc.blocks) + max(rc.limit/4, 1) }() // to look at all takes long
	var clean []int64
	for k, b := range rc.blocks {
		if b.dirty.Empty() && !b.writing {
			clean = append(clean, k)
		}
	}
	if len(clean) <= stay {
		return
	}
	slices.SortFunc(clean, func(a, b int64) int { return cmp.Compare(rc.blocks[a].used, rc.blocks[b].used) })
	for _, k := range clean[:len(clean)-stay] {
		delete(rc.blocks, k)
	}
}

// touch notes that a block is used.
func (rc *refcounts) touch(b *refBlock) {
	rc.clock++
	b.used = rc.clock
}

// crowded tells whether so many blocks are dirty that they should be written.
func (rc *refcounts) crowded() bool {
	dirty := 0
	for _, b := range rc.blocks {
		if !b.dirty.Empty() {
			dirty++
		}
	}
	return dirty > rc.limit
}

// add changes the counts of clusters that have refcount blocks and returns those that fell to 0.
func (rc *refcounts) add(r format.Run, delta int) (zero format.Runs, err error) {
	err = rc.g.EachBlock(r, func(k, i, n int64) error {
		b, err := rc.block(k)
		if err != nil {
			return err
		}
		if b == nil {
			return fmt.Errorf("%s: %w: clusters %d to %d are in use but have no refcount block", rc.f.Name(), ErrCorrupt, r.First, r.End()-1)
		}
		fell, err := b.add(i, n, delta)
		if err != nil {
			return fmt.Errorf("%s: refcount block %d: %w", rc.f.Name(), k, err)
		}
		for j := i; fell.ToZero && j < i+n; {
			from := b.counts.Find(j, i+n-j, 0)
			j = min(b.counts.NextNonzero(from), i+n)
			zero.Add(format.Run{First: rc.g.Counted(k, from), N: j - from})
		}
		return nil
	})
	return zero, err
}

// blockWrite is a block's sectors on their way to the disk.
type blockWrite struct {
	block *refBlock
	dirty format.SectorSet
	parts []format.MetaWrite
}

// takeDirty collects what has changed in the blocks; wrote tells what became of it.
func (rc *refcounts) takeDirty() []blockWrite {
	var ws []blockWrite
	for i, b := range rc.blocks {
		if b.dirty.Empty() {
			continue
		}
		ws = append(ws, blockWrite{b, b.dirty, b.dirty.Parts(b.counts.B, rc.table[i])})
		b.dirty, b.writing = nil, true
	}
	return ws
}

// wrote ends what takeDirty began: what was not written is dirty again.
func (rc *refcounts) wrote(ws []blockWrite, err error) {
	for _, w := range ws {
		w.block.writing = false
		if err != nil {
			w.block.dirty.AddAll(w.dirty)
		}
	}
	rc.dropClean(rc.limit)
}

// writeBack writes what has changed in the blocks. It does not sync.
func (rc *refcounts) writeBack() error {
	ws := rc.takeDirty()
	err := writeBlocks(rc.f, ws)
	rc.wrote(ws, err)
	return err
}

func writeBlocks(f File, ws []blockWrite) error {
	var parts []format.MetaWrite
	for _, w := range ws {
		parts = append(parts, w.parts...)
	}
	if err := host.WriteAll(f, parts); err != nil {
		return fmt.Errorf("write refcount blocks: %w", err)
	}
	return nil
}

// setTable replaces the table.
func (rc *refcounts) setTable(table []format.HostOffset, at format.Run) {
	rc.table, rc.tableAt = table, at
}

// forget takes a block that the table on disk does not have out again.
func (rc *refcounts) forget(i int64) {
	delete(rc.blocks, i)
	rc.table[i] = 0
}

package qcow2

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Clone writes a standalone version 3 image with v's content into dst, an empty file, and syncs it: fresh metadata, and
// the data in the order of v's file, of which it shares the blocks where the file system can, and copies them elsewhere;
// zeros stay holes. Nothing that happens to v's image later touches it.
//
// v must not change meanwhile: it is a snapshot, or the active disk of an image that nobody writes to. size is
// that of the new disk in bytes: at least v's, or 0 for v's. progress, if not nil, is told the bytes of data
// taken over and those there are. dst is not closed; it is empty again when Clone fails or
// is cancelled.
func Clone(ctx context.Context, dst File, v *View, size int64, progress func(done, total int64)) error {
	if size == 0 {
		size = v.Size()
	}
	size = roundToSectors(size)
	if size < v.Size() {
		return fmt.Errorf("%w: clone a disk of %d bytes into one of %d", ErrOutOfRange, v.Size(), size)
	}
	if err := requireEmpty(dst); err != nil {
		return err
	}
	p, err := planClone(ctx, v, size)
	if err == nil {
		err = p.writeRefcounts(dst)
	}
	if err == nil {
		err = p.writeContent(ctx, dst, progress)
	}
	if err == nil {
		err = p.writeHeader(dst)
	}
	if err != nil {
		err = fmt.Errorf("clone %s to %s: %w", v.img.f.Name(), dst.Name(), err)
		return errors.Join(err, dst.Truncate(0))
	}
	vouch(dst)
	return nil
}

// clonePlan says where a clone has what. First come the clusters that it takes over as they are, in the order of the
// source's file: however a guest's writes have scattered them, those that are neighbours there stay so, and are taken
// over together. What has to be read and written anew follows in guest order.
type clonePlan struct {
	layout
	v      *View
	whole  *clusterSet // of the source's file: taken over as they are
	wholes int64
	end    int64 // whole clusters in the source's file
}

// maxCloneClusters bounds the memory for a clone's plan, a bit for each cluster of the source's file, to 256 MiB.
const maxCloneClusters = 1 << 31

// planClone looks at what there is to take over.
func planClone(ctx context.Context, v *View, size int64) (*clonePlan, error) {
	g := v.img.g
	length, err := v.img.f.Size()
	if err != nil {
		return nil, err
	}
	p := &clonePlan{v: v, end: length >> g.clusterBits}
	if p.end > maxCloneClusters {
		return nil, fmt.Errorf("%w: the file has more than %d clusters", ErrLimit, int64(maxCloneClusters))
	}
	p.whole = newClusterSet(p.end)
	var twice *clusterSet // mapped more than once: not taken over, for each cluster of a clone is counted once
	var tables, anew int64
	err = p.eachTable(ctx, func(index int64, es []l2Entry) error {
		tables++
		for i, e := range es {
			c, ok := p.host(index, int64(i), e)
			switch {
			case e.kind().readsZero():
			case !ok:
				anew++
			case !p.whole.has(c):
				p.whole.add(c)
			default:
				if twice == nil {
					twice = newClusterSet(p.end)
				}
				twice.add(c)
				anew++
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if twice != nil {
		for r := range twice.runs() {
			anew += r.n
			for c := r.first; c < r.end(); c++ {
				p.whole.remove(c)
			}
		}
	}
	p.wholes = p.whole.seal()
	p.layout, err = newLayout(g, 3, size, tables, p.wholes+anew)
	return p, err
}

// eachTable calls fn for each L2 table of the source that maps something, with its L1 index and its checked entries, as far
// as the disk reaches.
func (p *clonePlan) eachTable(ctx context.Context, fn func(index int64, es []l2Entry) error) error {
	g, size := p.v.img.g, p.v.Size()
	for off := int64(0); off < size; off += g.l2Coverage {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(size-off, g.l2Coverage)
		es, err := p.v.mappedEntries(chunk{off: off, n: n, table: g.l1Index(off), last: g.l2Index(off + n - 1)})
		if err == nil && slices.ContainsFunc(es, func(e l2Entry) bool { return !e.kind().readsZero() }) {
			err = fn(g.l1Index(off), es)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// host returns the cluster that entry i of a table maps, if it can be taken over as it is: uncompressed, with nothing of
// it behind the end of the disk, where a larger clone would show it, or of the file.
func (p *clonePlan) host(index, i int64, e l2Entry) (int64, bool) {
	if k := e.kind(); k != kindData && k != kindMixed {
		return 0, false
	}
	c := e.offset() >> p.v.img.g.clusterBits
	return c, c < p.end && p.guest(index, i)+p.v.img.g.clusterSize <= p.v.Size()
}

// guest returns the offset on the disk of entry i of a table.
func (p *clonePlan) guest(index, i int64) int64 {
	return index*p.v.img.g.l2Coverage + i<<p.v.img.g.clusterBits
}

// writeContent writes L1 and L2 tables and takes over the data.
func (p *clonePlan) writeContent(ctx context.Context, dst File, progress func(done, total int64)) error {
	c := startCopier(ctx, dst, p.v, p.data<<p.v.img.g.clusterBits, progress)
	err := p.takeOver(c)
	if err == nil {
		err = p.writeTables(c, dst)
	}
	if e := c.wait(); err == nil || e != nil {
		err = e
	}
	return err
}

// takeOver takes over the clusters that stay as they are.
func (p *clonePlan) takeOver(c *copier) error {
	at := p.dataAt()
	for r := range p.whole.runs() {
		n := r.n << p.v.img.g.clusterBits
		if err := c.takeOver(r.first<<p.v.img.g.clusterBits, n, at); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// writeTables writes L1 and L2 tables, and copies what is written anew.
func (p *clonePlan) writeTables(c *copier, dst File) error {
	g := p.v.img.g
	l1 := make([]l1Entry, p.l1Size)
	l2 := newMetadataWriter(dst, p.l2At())
	t := g.newTable()
	nextTable, nextAnew := p.l2At(), p.dataAt()+p.wholes<<g.clusterBits
	changed := fmt.Errorf("%w: the source changed while it was cloned", ErrInUse)
	err := p.eachTable(c.ctx, func(index int64, es []l2Entry) error {
		if nextTable >= p.dataAt() {
			return changed
		}
		clear(t.b)
		for i, e := range es {
			if e.kind().readsZero() {
				continue
			}
			i := int64(i)
			if c, ok := p.host(index, i, e); ok && p.whole.has(c) {
				t.set(i, ownEntry(p.dataAt()+p.whole.place(c)<<g.clusterBits, e.sub))
				continue
			}
			if nextAnew >= p.clusters()<<g.clusterBits {
				return changed
			}
			off := p.guest(index, i)
			if err := c.copy(off, min(g.clusterSize, p.v.Size()-off), nextAnew); err != nil {
				return err
			}
			t.set(i, ownEntry(nextAnew, subAllocated))
			nextAnew += g.clusterSize
		}
		l1[index] = l1Entry(nextTable) | flagCopied
		nextTable += g.clusterSize
		_, err := l2.Write(t.b)
		return err
	})
	if err == nil {
		err = l2.Flush()
	}
	if err != nil {
		return err
	}
	_, err = dst.WriteAt(encodeL1(l1), p.l1At())
	return err
}

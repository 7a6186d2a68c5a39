package qcow2

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
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
	size = format.RoundToSectors(size)
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
	host.Vouch(dst)
	return nil
}

// clonePlan says where a clone has what. First come the clusters that it takes over as they are, in the order of the
// source's file: however a guest's writes have scattered them, those that are neighbours there stay so, and are taken
// over together. What has to be read and written anew follows in guest order.
type clonePlan struct {
	layout
	v         *View
	whole     *clusterSet // of the source's file: taken over as they are
	wholes    int64
	sourceEnd format.Cluster // end of the whole clusters in the source's file
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
	p := &clonePlan{v: v, sourceEnd: g.Cluster(format.HostOffset(length))}
	if p.sourceEnd > maxCloneClusters {
		return nil, fmt.Errorf("%w: the file has more than %d clusters", ErrLimit, int64(maxCloneClusters))
	}
	p.whole = newClusterSet(int64(p.sourceEnd))
	var twice *clusterSet // mapped more than once: not taken over, for each cluster of a clone is counted once
	var tables, anew int64
	err = p.eachTable(ctx, func(index int64, es []format.L2Entry) error {
		tables++
		for i, e := range es {
			c, ok := p.host(index, int64(i), e)
			switch {
			case e.Kind().ReadsZero():
			case !ok:
				anew++
			case !p.whole.has(c):
				p.whole.add(c)
			default:
				if twice == nil {
					twice = newClusterSet(int64(p.sourceEnd))
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
			anew += r.N
			for c := r.First; c < r.End(); c++ {
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
func (p *clonePlan) eachTable(ctx context.Context, fn func(index int64, es []format.L2Entry) error) error {
	g, size := p.v.img.g, p.v.Size()
	for off := format.GuestOffset(0); int64(off) < size; off = off.Plus(g.L2Coverage) {
		if err := ctx.Err(); err != nil {
			return err
		}
		c := g.Chunk(off, min(size-int64(off), g.L2Coverage))
		es, err := p.v.mappedEntries(c)
		if err == nil && slices.ContainsFunc(es, func(e format.L2Entry) bool { return !e.Kind().ReadsZero() }) {
			err = fn(c.Table, es)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// host returns the cluster that entry i of a table maps, if it can be taken over as it is: uncompressed, with nothing of
// it behind the end of the disk, where a larger clone would show it, or of the file.
func (p *clonePlan) host(index, i int64, e format.L2Entry) (format.Cluster, bool) {
	if k := e.Kind(); k != format.KindData && k != format.KindMixed {
		return 0, false
	}
	c := p.v.img.g.Cluster(e.Offset())
	return c, c < p.sourceEnd && int64(p.v.img.g.Guest(index, i+1)) <= p.v.Size()
}

// writeContent writes L1 and L2 tables and takes over the data.
func (p *clonePlan) writeContent(ctx context.Context, dst File, progress func(done, total int64)) error {
	c := startCopier(ctx, dst, p.v, p.v.img.g.Bytes(p.data), progress)
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
		n := p.v.img.g.Bytes(r.N)
		if err := c.takeOver(p.v.img.g.Offset(r.First), n, at); err != nil {
			return err
		}
		at = at.Plus(n)
	}
	return nil
}

// writeTables writes L1 and L2 tables, and copies what is written anew.
func (p *clonePlan) writeTables(c *copier, dst File) error {
	g := p.v.img.g
	l1 := make([]format.L1Entry, p.l1Size)
	l2 := newMetadataWriter(dst, p.l2At())
	t := g.NewTable()
	nextTable, nextAnew := p.l2At(), p.dataAt().Plus(g.Bytes(p.wholes))
	changed := fmt.Errorf("%w: the source changed while it was cloned", ErrInUse)
	err := p.eachTable(c.ctx, func(index int64, es []format.L2Entry) error {
		if nextTable >= p.dataAt() {
			return changed
		}
		clear(t.B)
		for i, e := range es {
			if e.Kind().ReadsZero() {
				continue
			}
			i := int64(i)
			if c, ok := p.host(index, i, e); ok && p.whole.has(c) {
				t.Set(i, format.OwnEntry(p.dataAt().Plus(g.Bytes(p.whole.before(c))), e.Sub))
				continue
			}
			if nextAnew >= p.end() {
				return changed
			}
			off := g.Guest(index, i)
			if err := c.copy(off, min(g.ClusterSize, p.v.Size()-int64(off)), nextAnew); err != nil {
				return err
			}
			t.Set(i, format.OwnEntry(nextAnew, format.SubAllocated))
			nextAnew = nextAnew.Plus(g.ClusterSize)
		}
		l1[index] = format.L1Entry(nextTable) | format.FlagCopied
		nextTable = nextTable.Plus(g.ClusterSize)
		_, err := l2.Write(t.B)
		return err
	})
	if err == nil {
		err = l2.Flush()
	}
	if err != nil {
		return err
	}
	_, err = dst.WriteAt(format.EncodeL1(l1), int64(p.l1At()))
	return err
}

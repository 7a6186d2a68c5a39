package qcow2

import (
	"context"
	"errors"
	"fmt"
)

// Clone writes a standalone version 3 image with v's content into dst, an empty file, and syncs it: fresh metadata,
// data clusters in guest order, shared with v's file where the file system can and copied elsewhere; zeros stay
// holes. Nothing that happens to v's image later touches it.
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
	l, err := planClone(ctx, v, size)
	if err == nil {
		err = l.writeRefcounts(dst)
	}
	if err == nil {
		err = cloneContent(ctx, dst, l, v, progress)
	}
	if err == nil {
		err = l.writeHeader(dst)
	}
	if err != nil {
		err = fmt.Errorf("clone %s to %s: %w", v.img.f.Name(), dst.Name(), err)
		return errors.Join(err, dst.Truncate(0))
	}
	return nil
}

// planClone counts what there is to take over.
func planClone(ctx context.Context, v *View, size int64) (layout, error) {
	g := v.img.g
	var tables, data int64
	lastTable := int64(-1)
	err := v.data(ctx, func(e Extent) error {
		data += g.clusters(e.Length)
		if t := g.l1Index(e.Offset); t != lastTable {
			tables, lastTable = tables+1, t
		}
		return nil
	})
	if err != nil {
		return layout{}, err
	}
	return newLayout(g, 3, size, tables, data)
}

// data calls fn for the extents of whole clusters that hold data, cut at the borders of L2 tables. Only those of
// kind Data hold nothing else.
func (v *View) data(ctx context.Context, fn func(Extent) error) error {
	coverage := v.img.g.l2Coverage
	return v.clusterExtents(0, func(e Extent) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.Kind < Data {
			return nil
		}
		for end := e.Offset + e.Length; e.Offset < end; {
			part := e
			part.Length = min(end-e.Offset, coverage-e.Offset%coverage)
			if err := fn(part); err != nil {
				return err
			}
			e.Offset += part.Length
			if e.Kind == Data {
				e.Host += part.Length
			}
		}
		return nil
	})
}

// cloneContent writes L1 and L2 tables and takes over the data.
func cloneContent(ctx context.Context, dst File, l layout, v *View, progress func(done, total int64)) error {
	g := l.g
	l1 := make([]l1Entry, l.l1Size)
	l2 := newMetadataWriter(dst, l.l2At())
	t, index := g.newTable(), int64(-1)
	nextTable, nextData := l.l2At(), l.dataAt()
	endTable := func() {
		if index >= 0 {
			_, _ = l2.Write(t.b) // Flush tells
			l1[index] = l1Entry(nextTable) | flagCopied
			nextTable += g.clusterSize
			clear(t.b)
		}
	}
	c := startCopier(ctx, dst, v, l.data<<g.clusterBits, progress)
	err := v.data(c.ctx, func(e Extent) error {
		if i := g.l1Index(e.Offset); i != index {
			endTable()
			index = i
		}
		n := g.clusters(e.Length)
		if nextTable >= l.dataAt() || nextData+n<<g.clusterBits > l.clusters()<<g.clusterBits {
			return fmt.Errorf("%w: the source changed while it was cloned", ErrInUse)
		}
		for i := range n {
			t.set(g.l2Index(e.Offset)+i, ownEntry(nextData+i<<g.clusterBits, subAllocated))
		}
		if err := c.copy(e, nextData); err != nil {
			return err
		}
		nextData += n << g.clusterBits
		return nil
	})
	if e := c.wait(); err == nil || e != nil {
		err = e
	}
	if err != nil {
		return err
	}
	endTable()
	if err := l2.Flush(); err != nil {
		return err
	}
	_, err = dst.WriteAt(encodeL1(l1), l.l1At())
	return err
}

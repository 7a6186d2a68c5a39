package qcow2

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
)

const (
	copyStreams = 4       // parallel copies: a disk is faster with some requests in flight
	copyChunk   = 1 << 20 // bytes copied at once
	// shareSlice is how much is shared at once: XFS blocks the source's writes for as long as that takes.
	shareSlice = 16 << 20
)

// copier takes the data of extents over into another file: by sharing blocks where the file system can, else by
// parallel copies that leave zeros out. startCopier starts its goroutines, wait ends them.
type copier struct {
	ctx      context.Context // ends with the first failure
	cancel   context.CancelCauseFunc
	dst      File
	v        *View
	share    RangeCloner // nil where blocks cannot be shared
	work     chan copyPiece
	running  sync.WaitGroup
	done     atomic.Int64 // bytes
	total    int64
	progress func(done, total int64)
}

// copyPiece is at most a chunk of guest data and the place it goes to.
type copyPiece struct {
	e  Extent
	to int64
}

func startCopier(ctx context.Context, dst File, v *View, total int64, progress func(done, total int64)) *copier {
	c := &copier{dst: dst, v: v, work: make(chan copyPiece), total: total, progress: progress}
	c.share, _ = dst.(RangeCloner)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	for range copyStreams {
		c.running.Go(c.run)
	}
	return c
}

// copy takes over an extent, or has it taken over, to file offset to. It is called by one goroutine.
func (c *copier) copy(e Extent, to int64) error {
	size := int64(copyChunk)
	if c.share != nil && e.Kind == Data {
		size = shareSlice
	}
	for e.Length > 0 {
		piece := e
		piece.Length = min(e.Length, size)
		if err := c.take(piece, to); err != nil {
			return err
		}
		if c.progress != nil {
			c.progress(min(c.done.Load(), c.total), c.total)
		}
		e.Offset, e.Length, to = e.Offset+piece.Length, e.Length-piece.Length, to+piece.Length
		if e.Kind == Data {
			e.Host += piece.Length
		}
	}
	return nil
}

func (c *copier) take(e Extent, to int64) error {
	if c.share != nil && e.Kind == Data {
		switch err := c.shareClusters(e, to); {
		case err == nil:
			return nil
		case !errors.Is(err, errors.ErrUnsupported):
			return err
		}
	}
	for e.Length > 0 {
		piece := copyPiece{e, to}
		piece.e.Length = min(e.Length, copyChunk)
		select {
		case c.work <- piece:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
		e.Offset, e.Length, to = e.Offset+piece.e.Length, e.Length-piece.e.Length, to+piece.e.Length
	}
	return nil
}

// shareClusters shares whole clusters, for the end of a disk is not always one of a file system's block.
func (c *copier) shareClusters(e Extent, to int64) error {
	n := c.v.img.g.clusters(e.Length) << c.v.img.g.clusterBits
	if length, err := c.v.img.f.Size(); err != nil || e.Host+n > length {
		return errors.Join(err, errors.ErrUnsupported) // the last cluster of the file may be cut
	}
	if err := c.share.CloneRange(c.v.img.f.File, e.Host, to, n); err != nil {
		return err
	}
	c.done.Add(e.Length)
	return nil
}

// run copies pieces until there are no more.
func (c *copier) run() {
	buf, zeros := make([]byte, copyChunk), make([]byte, zeroPiece)
	for p := range c.work {
		if err := c.copyPiece(buf[:p.e.Length], zeros, p); err != nil {
			c.cancel(err)
			return
		}
	}
}

// zeroPiece is the unit in which zeros are left out, in bytes.
const zeroPiece = 64 << 10

func (c *copier) copyPiece(buf, zeros []byte, p copyPiece) error {
	if _, err := c.v.ReadAt(buf, p.e.Offset); err != nil {
		return err
	}
	for at := 0; at < len(buf); {
		from := at // of what is not zeros
		n := min(zeroPiece, len(buf)-at)
		for n > 0 && !bytes.Equal(buf[at:at+n], zeros[:n]) {
			at += n
			n = min(zeroPiece, len(buf)-at)
		}
		if from < at {
			if _, err := c.dst.WriteAt(buf[from:at], p.to+int64(from)); err != nil {
				return err
			}
		}
		at += n // zeros
	}
	c.done.Add(p.e.Length)
	return nil
}

// wait ends the goroutines when all pieces are done, and returns the first error.
func (c *copier) wait() error {
	close(c.work)
	c.running.Wait()
	defer c.cancel(nil)
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	if c.progress != nil {
		c.progress(c.total, c.total)
	}
	return nil
}

package qcow2

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

const (
	copyStreams = 4       // parallel copies: a disk is faster with some requests in flight
	copyChunk   = 1 << 20 // bytes copied at once
)

// How much is shared at once: the source's writes wait for as long as that takes, so it is made to take about shareTime.
const (
	shareLeast = 1 << 20
	shareFirst = 16 << 20
	shareMost  = 1 << 30
	shareTime  = 5 * time.Millisecond
	// settleTime is for how long is shared, beside guests, until it is settled.
	settleTime = 100 * time.Millisecond
)

// copier takes data over into another file: by sharing blocks where the file system can, else by parallel copies that
// leave zeros out. startCopier starts its goroutines, wait ends them. Its methods are called by one goroutine.
type copier struct {
	ctx      context.Context // ends with the first failure
	cancel   context.CancelCauseFunc
	dst      File
	v        *View
	cloner   RangeCloner // nil where blocks cannot be shared
	slice    int64       // shared at once
	requests int64       // of guests before it began
	settled  time.Time   // when what is shared was last settled
	work     chan copyPiece
	running  sync.WaitGroup
	done     atomic.Int64 // bytes
	total    int64
	progress func(done, total int64)
}

// copyPiece is at most a chunk of data and the place it goes to.
type copyPiece struct {
	n    int64
	to   format.HostOffset
	read func(p []byte) error
}

func startCopier(ctx context.Context, dst File, v *View, total int64, progress func(done, total int64)) *copier {
	c := &copier{dst: dst, v: v, slice: shareFirst, work: make(chan copyPiece), total: total, progress: progress, requests: v.img.requests.Load()}
	c.cloner, _ = dst.(RangeCloner)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	for range copyStreams {
		c.running.Go(c.run)
	}
	return c
}

// takeOver takes over n bytes, whole clusters, that lie at off in the source's file.
func (c *copier) takeOver(off format.HostOffset, n int64, to format.HostOffset) error {
	for n > 0 && c.cloner != nil {
		k := min(n, c.slice)
		err := c.share(off, k, to)
		if errors.Is(err, errors.ErrUnsupported) {
			c.cloner = nil
			break
		}
		if err != nil {
			return err
		}
		off, n, to = off.Plus(k), n-k, to.Plus(k)
	}
	for n > 0 {
		k, from := min(n, copyChunk), off
		if err := c.send(copyPiece{k, to, func(p []byte) error { return format.ReadPadded(c.v.img.f, p, from) }}); err != nil {
			return err
		}
		off, n, to = off.Plus(k), n-k, to.Plus(k)
	}
	return nil
}

func (c *copier) settle() error {
	c.settled = time.Now()
	if s, ok := c.cloner.(host.Settler); ok {
		return s.Settle()
	}
	return nil
}

// share shares blocks, and looks how long that takes. If there are guests their requests are given as much time then, for the
// next share may be faster than they are to get at the file.
func (c *copier) share(off format.HostOffset, n int64, to format.HostOffset) error {
	if err := c.ctx.Err(); err != nil {
		return context.Cause(c.ctx)
	}
	start := time.Now()
	if err := c.cloner.CloneRange(c.v.img.f.File, int64(off), int64(to), n); err != nil {
		return err
	}
	took := time.Since(start)
	switch {
	case took > 2*shareTime:
		c.slice = max(c.slice/2, shareLeast)
	case took < shareTime && n == c.slice:
		c.slice = min(c.slice*2, shareMost)
	}
	c.done.Add(n)
	c.tell()
	if c.v.img.requests.Load() == c.requests {
		return nil
	}
	select {
	case <-c.ctx.Done():
	case <-time.After(took):
	}
	if time.Since(c.settled) > settleTime {
		return c.settle()
	}
	return nil
}

// copy copies n bytes of the disk, at most a cluster.
func (c *copier) copy(off format.GuestOffset, n int64, to format.HostOffset) error {
	for n > 0 {
		k, from := min(n, copyChunk), off
		if err := c.send(copyPiece{k, to, func(p []byte) error { _, err := c.v.ReadAt(p, int64(from)); return err }}); err != nil {
			return err
		}
		off, n, to = off.Plus(k), n-k, to.Plus(k)
	}
	return nil
}

func (c *copier) send(p copyPiece) error {
	select {
	case c.work <- p:
		c.tell()
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

func (c *copier) tell() {
	if c.progress != nil {
		c.progress(min(c.done.Load(), c.total), c.total)
	}
}

// run copies pieces until there are no more.
func (c *copier) run() {
	buf, zeros := make([]byte, copyChunk), make([]byte, zeroPiece)
	for p := range c.work {
		if err := c.copyPiece(buf[:p.n], zeros, p); err != nil {
			c.cancel(err)
			return
		}
	}
}

// zeroPiece is the unit in which zeros are left out, in bytes.
const zeroPiece = 64 << 10

func (c *copier) copyPiece(buf, zeros []byte, p copyPiece) error {
	if err := p.read(buf); err != nil {
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
			if _, err := c.dst.WriteAt(buf[from:at], int64(p.to)+int64(from)); err != nil {
				return err
			}
		}
		at += n // zeros
	}
	c.done.Add(p.n)
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
	if err := c.settle(); err != nil {
		return err
	}
	if c.progress != nil {
		c.progress(c.total, c.total)
	}
	return nil
}

package worker

import (
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// backend is the image as the device sees it. It counts the requests, and remembers the error after which the image
// serves nothing more. After damage has been met nothing is written any more, but what is sound is read.
type backend struct {
	*qcow2.Image
	failed    atomic.Pointer[error]
	corrupted atomic.Bool   // and said so
	discarded chan struct{} // has one when something was discarded since trim looked

	reads, writes, zeroes, discards, flushes operations

	direct [blockdev.DirectRequests]directRequest
}

// directRequest is a request whose I/O the device's server does by itself.
type directRequest struct {
	qcow2.Direct
	start time.Time
	bytes int64
	write bool
}

var _ blockdev.Direct = (*backend)(nil)

func (b *backend) DirectFile() (fd int, ok bool) { return b.DirectFD() }

func (b *backend) StartDirect(number int, off, n int64, write bool) (at int64, ok bool) {
	r := &b.direct[number]
	at, ok = b.Image.StartDirect(&r.Direct, off, n, write)
	if ok {
		r.start, r.bytes, r.write = time.Now(), n, write
	}
	return at, ok
}

func (b *backend) EndDirect(number int, failed bool) {
	r := &b.direct[number]
	b.Image.EndDirect(&r.Direct, r.write)
	switch {
	case failed: // it is made again, and counted then
	case r.write:
		_ = b.note(&b.writes, r.start, r.bytes, nil)
	default:
		_ = b.note(&b.reads, r.start, r.bytes, nil)
	}
}

// operations counts the requests of one kind.
type operations struct {
	count, bytes, errors, nanoseconds atomic.Int64
}

func (b *backend) ReadAt(p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := b.Image.ReadAt(p, off)
	return n, b.note(&b.reads, start, int64(n), err)
}

func (b *backend) WriteAt(p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := b.Image.WriteAt(p, off)
	return n, b.note(&b.writes, start, int64(n), err)
}

func (b *backend) WriteZeroes(off, n int64) error {
	start := time.Now()
	return b.note(&b.zeroes, start, n, b.Image.WriteZeroes(off, n))
}

func (b *backend) Discard(off, n int64) error {
	start := time.Now()
	err := b.note(&b.discards, start, n, b.Image.Discard(off, n))
	select {
	case b.discarded <- struct{}{}:
	default:
	}
	return err
}

func (b *backend) Flush() error {
	start := time.Now()
	return b.note(&b.flushes, start, 0, b.Image.Flush())
}

// note counts a request that has ended, and returns its error.
func (b *backend) note(o *operations, start time.Time, n int64, err error) error {
	o.count.Add(1)
	o.bytes.Add(n)
	o.nanoseconds.Add(int64(time.Since(start)))
	if err == nil {
		return nil // the usual way: no errors.Is
	}
	o.errors.Add(1)
	switch {
	case errors.Is(err, qcow2.ErrFailed):
		if b.failed.CompareAndSwap(nil, &err) {
			klog.ErrorS(err, "Image failed")
		}
	case errors.Is(err, qcow2.ErrCorrupt):
		if b.corrupted.CompareAndSwap(false, true) {
			klog.ErrorS(err, "Image is corrupt")
		}
	}
	return err
}

// count returns how many requests have ended.
func (b *backend) count() int64 {
	return b.reads.count.Load() + b.writes.count.Load() + b.zeroes.count.Load() + b.discards.count.Load() + b.flushes.count.Load()
}

// operations returns what has been counted.
func (b *backend) operations() []*api.Operations {
	var all []*api.Operations
	for _, o := range []struct {
		kind string
		*operations
	}{{"read", &b.reads}, {"write", &b.writes}, {"zero", &b.zeroes}, {"discard", &b.discards}, {"flush", &b.flushes}} {
		all = append(all, &api.Operations{
			Kind: o.kind, Count: o.count.Load(), Bytes: o.bytes.Load(), Errors: o.errors.Load(), Nanoseconds: o.nanoseconds.Load(),
		})
	}
	return all
}

// errno is what a user of the device sees of an error.
func errno(err error) uintptr {
	if errors.Is(err, qcow2.ErrNoSpace) {
		return uintptr(unix.ENOSPC)
	}
	return uintptr(unix.EIO)
}

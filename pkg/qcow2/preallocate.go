package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// Preallocation says what of a new image's disk has host clusters from the start. What is discarded later is given up
// all the same.
type Preallocation int

// The kinds of preallocation, as QEMU has them.
const (
	PreallocationOff      Preallocation = iota // none
	PreallocationMetadata                      // all clusters are mapped; the file is sparse
	PreallocationFalloc                        // and the file system has reserved their blocks
	PreallocationFull                          // and zeros are written to them
)

func preallocationNames() []string { return []string{"off", "metadata", "falloc", "full"} }

// ParsePreallocation returns the kind of that name: off, metadata, falloc or full.
func ParsePreallocation(name string) (Preallocation, error) {
	for i, n := range preallocationNames() {
		if n == name {
			return Preallocation(i), nil
		}
	}
	return 0, fmt.Errorf("%w: preallocation %q; it is off, metadata, falloc or full", ErrUnsupported, name)
}

// String returns the name.
func (p Preallocation) String() string { return preallocationNames()[p] }

// preallocatePiece is how much is filled between two looks at the context, in bytes.
const preallocatePiece = 1 << 30

// preallocate fills the data clusters of a file that has its length already. A full disk is met before anything is
// written, where the file system can tell.
func (l layout) preallocate(ctx context.Context, f File, kind Preallocation) error {
	if kind < PreallocationFalloc {
		return nil
	}
	err := l.eachPiece(ctx, func(off, n int64) error {
		a, ok := f.(Allocator)
		if !ok {
			return errors.ErrUnsupported
		}
		return a.Allocate(off, n)
	})
	if err != nil && !errors.Is(err, errors.ErrUnsupported) || err == nil && kind == PreallocationFalloc {
		return err
	}
	zeros := make([]byte, host.ZeroChunk)
	return l.eachPiece(ctx, func(off, n int64) error {
		for end := off + n; off < end; off += host.ZeroChunk {
			if _, err := f.WriteAt(zeros[:min(host.ZeroChunk, end-off)], off); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachPiece calls fn for the data clusters piece by piece.
func (l layout) eachPiece(ctx context.Context, fn func(off, n int64) error) error {
	for off, end := int64(l.dataAt()), int64(l.end()); off < end; off += preallocatePiece {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(off, min(preallocatePiece, end-off)); err != nil {
			return err
		}
	}
	return nil
}

// writeMapping maps all of the disk to the data clusters, in order.
func (l layout) writeMapping(f File) error {
	l1 := make([]format.L1Entry, l.l1Size)
	w := newMetadataWriter(f, l.l2At())
	t, mapped := l.g.NewTable(), int64(0)
	for i := range l.l2 {
		clear(t.B)
		for k := range min(l.g.L2Entries, l.data-mapped) {
			t.Set(k, format.OwnEntry(l.dataAt().Plus(l.g.Bytes(mapped+k)), format.SubAllocated))
		}
		mapped += l.g.L2Entries
		_, _ = w.Write(t.B) // Flush tells
		l1[i] = format.L1Entry(l.l2At().Plus(l.g.Bytes(i))) | format.FlagCopied
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.WriteAt(format.EncodeL1(l1), int64(l.l1At()))
	return err
}

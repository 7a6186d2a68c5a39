package qcow2

import (
	"context"
	"errors"
	"fmt"
)

// cloneChunk is what Clone copies at once, in bytes.
const cloneChunk = 1 << 20

// Clone writes a standalone version 3 image with v's content into dst, an empty file, and syncs it; zeros stay
// holes. size is that of the new disk in bytes: at least v's, or 0 for v's. progress, if not nil, is told the
// guest bytes done. It does not close dst; what a failed or cancelled one leaves there is not an image.
func Clone(ctx context.Context, dst File, v *View, size int64, progress func(done, total int64)) error {
	if size == 0 {
		size = v.Size()
	}
	if size < v.Size() {
		return fmt.Errorf("%w: clone a disk of %d bytes into one of %d", ErrOutOfRange, v.Size(), size)
	}
	if err := Create(dst, size, CreateOptions{ClusterSize: v.img.g.clusterSize}); err != nil {
		return err
	}
	img, err := Open(keepOpen{dst}, OpenOptions{})
	if err != nil {
		return err
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	buf := make([]byte, cloneChunk)
	err = v.Extents(0, func(e Extent) error {
		progress(e.Offset, v.Size())
		if e.Kind != Data && e.Kind != Compressed {
			return ctx.Err()
		}
		return copyExtent(ctx, img, v, e, buf, func(at int64) { progress(at, v.Size()) })
	})
	if err := errors.Join(err, img.Close()); err != nil {
		return fmt.Errorf("clone %s: %w", v.img.f.Name(), err)
	}
	progress(v.Size(), v.Size())
	return nil
}

func copyExtent(ctx context.Context, dst *Image, v *View, e Extent, buf []byte, progress func(at int64)) error {
	for at, end := e.Offset, e.Offset+e.Length; at < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), end-at)]
		if _, err := v.ReadAt(p, at); err != nil {
			return err
		}
		if _, err := dst.WriteAt(p, at); err != nil {
			return err
		}
		at += int64(len(p))
		progress(at)
	}
	return nil
}

// keepOpen is a File that its caller goes on to own.
type keepOpen struct{ File }

func (keepOpen) Close() error { return nil }

package qcow2

import "fmt"

// metaWriter gathers writes, which are made in the order of their calls: what comes one after the other in the file is
// written together.
type metaWriter struct {
	f     File
	off   int64
	b     []byte // to be written at off
	total int64  // bytes written so far
}

// maxGathered is how many bytes are written together.
const maxGathered = 1 << 20

// write takes a copy of b.
func (w *metaWriter) write(off int64, b []byte) error {
	if off != w.off+int64(len(w.b)) || len(w.b)+len(b) > maxGathered {
		if err := w.flush(); err != nil {
			return err
		}
		w.off = off
	}
	if w.b == nil {
		w.b = make([]byte, 0, maxGathered)
	}
	w.b = append(w.b, b...)
	return nil
}

// zeros writes n zeros behind what was written last.
func (w *metaWriter) zeros(n int64) error {
	return w.write(w.off+int64(len(w.b)), make([]byte, n))
}

// flush writes what was gathered.
func (w *metaWriter) flush() error {
	if len(w.b) == 0 {
		return nil
	}
	if _, err := w.f.WriteAt(w.b, w.off); err != nil {
		return fmt.Errorf("write metadata: %w", err)
	}
	if f, ok := w.f.(writebacker); ok {
		f.StartWriteback(w.off, int64(len(w.b))) // the disk works while we go on, and a sync has less to do
	}
	w.total += int64(len(w.b))
	w.off += int64(len(w.b))
	w.b = w.b[:0]
	return nil
}

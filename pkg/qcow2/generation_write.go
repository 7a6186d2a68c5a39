package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// metaWriter gathers writes, which are made in the order of their calls: what comes one after the other in the file is
// written together, while the next is gathered.
type metaWriter struct {
	f       File
	growth  *lock.RWMutex[lock.Growth] // see allocator
	off     format.HostOffset
	b       []byte // to be written at off
	spare   []byte
	writing chan error // of the write that is under way, nil if there is none
	total   int64      // bytes written so far
}

// maxGathered is how many bytes are written together.
const maxGathered = 1 << 20

// write takes a copy of b.
func (w *metaWriter) write(off format.HostOffset, b []byte) error {
	err := w.turnTo(off, int64(len(b)))
	if err == nil {
		w.b = append(w.b, b...)
	}
	return err
}

// zeros writes n zeros behind what was written last.
func (w *metaWriter) zeros(n int64) error {
	return w.write(w.off.Plus(int64(len(w.b))), make([]byte, n))
}

// turnTo sees to it that n bytes at off can be appended to b.
func (w *metaWriter) turnTo(off format.HostOffset, n int64) error {
	if w.b == nil {
		m := host.NewMemory(2 * maxGathered)
		w.b, w.spare = m[:0:maxGathered], m[maxGathered:maxGathered]
	}
	if off != w.off.Plus(int64(len(w.b))) || int64(len(w.b))+n > maxGathered {
		if err := w.send(); err != nil {
			return err
		}
		w.off = off
	}
	return nil
}

// send begins to write what was gathered, when what came before it is written.
func (w *metaWriter) send() error {
	if err := w.wait(); err != nil || len(w.b) == 0 {
		return err
	}
	b, off, done := w.b, w.off, make(chan error, 1)
	w.b, w.spare, w.writing = w.spare[:0], b, done
	w.off = off.Plus(int64(len(b)))
	w.total += int64(len(b))
	go func() {
		w.growth.RLock()
		_, err := w.f.WriteAt(b, int64(off))
		w.growth.RUnlock()
		if f, ok := w.f.(host.Writebacker); ok && err == nil {
			f.StartWriteback(int64(off), int64(len(b))) // the disk works while we go on, and a sync has less to do
		}
		done <- err
	}()
	return nil
}

// wait returns when no write is under way.
func (w *metaWriter) wait() error {
	if w.writing == nil {
		return nil
	}
	err := <-w.writing
	w.writing = nil
	if err != nil {
		return fmt.Errorf("write metadata: %w", err)
	}
	return nil
}

// flush writes what was gathered.
func (w *metaWriter) flush() error {
	if err := w.send(); err != nil {
		return err
	}
	return w.wait()
}

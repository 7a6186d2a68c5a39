package qcow2

import (
	"sync/atomic"
	"testing"
	"time"
)

// slowSizeFile takes its time to tell its length, once.
type slowSizeFile struct {
	*memFile
	hold atomic.Bool
	held chan struct{} // the length is known, and not yet told
	tell chan struct{}
}

func (f *slowSizeFile) Size() (int64, error) {
	n, err := f.memFile.Size()
	if f.hold.CompareAndSwap(true, false) {
		close(f.held)
		<-f.tell
	}
	return n, err
}

// A reservation makes the file longer while an operation writes behind its end: none of that is cut off.
func TestReserveBesideOperation(t *testing.T) {
	f := &slowSizeFile{memFile: newMemFile("disk"), held: make(chan struct{}), tell: make(chan struct{})}
	must(t, Create(t.Context(), f, 64<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(pattern(1, 4096), 0)
	must(t, err)
	img.background.Wait()

	reserved := make(chan error, 1)
	_, err = img.CreateSnapshot(t.Context(), "new", func(Snapshot) {
		f.hold.Store(true)
		go func() { reserved <- img.alloc.reserve(img.alloc.ready.Clusters() + 1) }()
		<-f.held
		// That the operation writes by then shows a mistake; that it does not hides one.
		time.AfterFunc(50*time.Millisecond, func() { close(f.tell) })
	})
	must(t, err)
	must(t, <-reserved)

	if r, err := checkFile(t.Context(), f.clone()); err != nil || r.Corruptions != 0 {
		t.Errorf("our check: %+v, %v", r, err)
	}
	must(t, img.Close())
	path := tempImage(t)
	f.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Error(q.output)
	}
}

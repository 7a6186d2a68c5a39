package qcow2

import (
	"sync/atomic"
	"testing"
	"time"
)

// heldFile holds up one write until it is released.
type heldFile struct {
	*memFile
	hold     atomic.Bool // the next write is held up
	held     chan struct{}
	released chan struct{}
}

func (f *heldFile) WriteAt(p []byte, off int64) (int, error) {
	if f.hold.CompareAndSwap(true, false) {
		close(f.held)
		<-f.released
	}
	return f.memFile.WriteAt(p, off)
}

// An operation reads tables from the disk. So it waits for a guest's flush that is writing them.
func TestOperationBesideCommit(t *testing.T) {
	for name, operation := range map[string]func(*Image) error{
		"delete": func(img *Image) error { return img.DeleteSnapshot(ByName("old")) },
		"create": func(img *Image) error { _, err := img.CreateSnapshot("new", nil); return err },
		"grow":   func(img *Image) error { return img.Resize(128 << 20) },
		"goto":   func(img *Image) error { return img.GotoSnapshot(ByName("old")) },
	} {
		t.Run(name, func(t *testing.T) {
			f := &heldFile{memFile: newMemFile(name), held: make(chan struct{}), released: make(chan struct{})}
			must(t, Create(f, 64<<20, CreateOptions{}))
			img, err := Open(f, OpenOptions{})
			must(t, err)
			write := func(seed byte, off int64) {
				_, err := img.WriteAt(pattern(seed, 4096), off)
				must(t, err)
			}
			write(1, 0)
			write(1, 1<<20)
			_, err = img.CreateSnapshot("old", nil)
			must(t, err)
			write(2, 0)
			must(t, img.Flush())
			write(2, 2<<20)
			img.background.Wait()

			f.hold.Store(true)
			results := make(chan error, 2)
			go func() { results <- img.Flush() }()
			<-f.held
			go func() { results <- operation(img) }()
			<-time.After(50 * time.Millisecond) // that it begins by then shows a mistake; that it does not hides one
			close(f.released)
			must(t, <-results)
			must(t, <-results)

			got, want := make([]byte, 4096), pattern(2, 4096)
			if name == "goto" {
				clear(want)
			}
			_, err = img.ReadAt(got, 2<<20)
			must(t, err)
			if i := difference(got, want); i >= 0 {
				t.Errorf("what was flushed beside it differs at %#x", i)
			}
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("our check: %+v, %v", r, err)
			}
			path := tempImage(t)
			f.save(t, path)
			if q := runQemuCheck(t, path); q.exit != 0 {
				t.Error(q.output)
			}
		})
	}
}

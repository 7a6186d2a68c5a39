package qcow2

import (
	"sync/atomic"
	"testing"
	"time"
)

// heldFile holds up one write or punch until it is released.
type heldFile struct {
	*memFile
	hold      atomic.Bool // the next write is held up
	holdPunch atomic.Bool
	held      chan struct{}
	released  chan struct{}
}

func newHeldFile(name string) *heldFile {
	return &heldFile{memFile: newMemFile(name), held: make(chan struct{}), released: make(chan struct{})}
}

func (f *heldFile) wait(hold *atomic.Bool) {
	if hold.CompareAndSwap(true, false) {
		close(f.held)
		<-f.released
	}
}

func (f *heldFile) WriteAt(p []byte, off int64) (int, error) {
	f.wait(&f.hold)
	return f.memFile.WriteAt(p, off)
}

func (f *heldFile) PunchHole(off, n int64) error {
	f.wait(&f.holdPunch)
	return f.memFile.PunchHole(off, n)
}

// check checks the closed image with our checker and QEMU's.
func (f *heldFile) check(t *testing.T) {
	t.Helper()
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("our check: %+v, %v", r, err)
	}
	path := tempImage(t)
	f.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Error(q.output)
	}
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
			f := newHeldFile(name)
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
			f.check(t)
		})
	}
}

// A flush that frees many clusters is answered before they are punched. Whoever commits, or closes the image, waits for that.
func TestFlushBeforeRelease(t *testing.T) {
	const cluster, many = 64 << 10, 2 * callsAtOnce
	f := newHeldFile("flush")
	must(t, Create(f, 64<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(pattern(1, 2*many*cluster), 0)
	must(t, err)
	must(t, img.Flush())
	img.background.Wait()
	for i := range int64(many) {
		must(t, img.Discard(2*i*cluster, cluster))
	}
	f.holdPunch.Store(true)
	flushed := make(chan error)
	go func() { flushed <- img.Flush() }()
	<-f.held
	select {
	case err := <-flushed:
		must(t, err)
	case <-time.After(time.Minute):
		t.Fatal("the flush waits for a punch")
	}
	if img.commitMu.TryLock() {
		t.Error("nobody would wait for the release")
		img.commitMu.Unlock()
	}
	closed := make(chan error)
	go func() { closed <- img.Close() }()
	close(f.released)
	must(t, <-closed)
	f.check(t)
}

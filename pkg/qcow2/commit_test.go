package qcow2

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
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

// checkSaved checks a closed image with our checker and QEMU's.
func checkSaved(t *testing.T, f *memFile) {
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
		"delete": func(img *Image) error { return img.DeleteSnapshot(t.Context(), ByName("old")) },
		"create": func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "new", nil); return err },
		"grow":   func(img *Image) error { return img.Resize(t.Context(), 128<<20) },
		"goto":   func(img *Image) error { return img.GotoSnapshot(t.Context(), ByName("old")) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newHeldFile(name)
			must(t, Create(t.Context(), f, 64<<20, CreateOptions{}))
			img, err := Open(f, OpenOptions{})
			must(t, err)
			write := func(seed byte, off int64) {
				_, err := img.WriteAt(pattern(seed, 4096), off)
				must(t, err)
			}
			write(1, 0)
			write(1, 1<<20)
			_, err = img.CreateSnapshot(t.Context(), "old", nil)
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
			checkSaved(t, f.memFile)
		})
	}
}

const manyFreed = 2 * host.CallsAtOnce

// freeMany opens an image of 64 KiB clusters in which manyFreed clusters are discarded, but not yet flushed. Nothing is reserved.
func freeMany(t *testing.T) (*heldFile, *Image) {
	t.Helper()
	const cluster = 64 << 10
	f := newHeldFile("flush")
	must(t, Create(t.Context(), f, 64<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	img.alloc.ahead = true // nothing is reserved in the background
	_, err = img.WriteAt(pattern(1, 2*manyFreed*cluster), 0)
	must(t, err)
	must(t, img.Flush())
	must(t, img.alloc.endReservation())
	for i := range int64(manyFreed) {
		must(t, img.Discard(2*i*cluster, cluster))
	}
	return f, img
}

// A flush that frees many clusters is answered before they are punched. Whoever commits, or closes the image, waits for that.
func TestFlushBeforeRelease(t *testing.T) {
	f, img := freeMany(t)
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
	checkSaved(t, f.memFile)
}

// A guest that meets a full disk waits for what an answered flush is about to release, and tries again.
func TestFullDiskBesideRelease(t *testing.T) {
	f, img := freeMany(t)
	img.commitMu.Lock()
	img.setReleasing(true)
	tries, full, done := 0, make(chan struct{}), make(chan error)
	go func() {
		done <- img.withSpace(func() error {
			if tries++; tries > 1 {
				return nil
			}
			close(full)
			return ErrNoSpace
		})
	}()
	<-full
	img.setReleasing(false)
	img.commitMu.Unlock()
	must(t, <-done)
	must(t, img.Close())
	checkSaved(t, f.memFile)
}

// Counts that cannot be written now, to save memory, are written later.
func TestReleaseCannotWriteCounts(t *testing.T) {
	f, img := scatteredImage(t)
	img.alloc.rc.limit = 1
	full := true
	f.setFault(func(c fileCall) error {
		for _, off := range img.alloc.rc.table {
			if full && c.kind == callWrite && off != 0 && c.off >= int64(off) && c.off < int64(off)+img.g.ClusterSize {
				return ErrNoSpace
			}
		}
		return nil
	})
	must(t, img.Discard(0, img.Size()))
	must(t, img.Flush())
	must(t, img.commit())
	must(t, img.failed())
	full = false
	must(t, img.Close())
	checkSaved(t, f)
}

func TestDropCacheOfReadOnlyImage(t *testing.T) {
	f := newMemFile("read-only")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{ReadOnly: true})
	must(t, err)
	img.DropCache()
	must(t, img.Close())
}

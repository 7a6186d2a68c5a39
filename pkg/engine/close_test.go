package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// failingFile fails to sync on request.
type failingFile struct {
	qcow2.File
	fails atomic.Bool
}

func (f *failingFile) Sync() error {
	if f.fails.Load() {
		return unix.EIO
	}
	return f.File.Sync()
}

// An image that was not closed in order is not marked as if it had been: the next attach looks for what is lost.
func TestCleanIfClosed(t *testing.T) {
	for what, fails := range map[string]bool{"closed": false, "closing fails": true} {
		t.Run(what, func(t *testing.T) {
			r := newIdleRig(t)
			must(t, pool.Init(r.dir))
			var err error
			r.pool, err = pool.Open(r.dir)
			must(t, err)
			id := r.newVolume("a", mib)
			lease, err := r.pool.Lock(id)
			must(t, err)
			defer func() { must(t, lease.Unlock()) }()
			must(t, lease.MarkAttached())
			file, err := qcow2.OpenFile(r.pool.ImagePath(id), false)
			must(t, err)
			f := &failingFile{File: file}
			s := &served{lease: lease}
			s.tasksCtx, s.stopTasks = context.WithCancel(t.Context())
			s.img, err = qcow2.Open(f, qcow2.OpenOptions{})
			must(t, err)
			_, err = s.img.WriteAt(make([]byte, 4096), 0)
			must(t, err)
			f.fails.Store(fails)
			if err := s.closeImage(); (err != nil) != fails {
				t.Errorf("closed: %v", err)
			}
			unclean, err := lease.WasUnclean()
			must(t, err)
			if unclean != fails {
				t.Errorf("it counts as unclean: %v", unclean)
			}
		})
	}
}

// A clone that was answered is there after a power cut.
func TestCloneIsDurable(t *testing.T) {
	r := newDiskRig(t, 512*mib)
	ctx := testContext(t)
	id := r.newVolume("a", 8*mib)
	fillDevice(t, r.attach(id), 0, mib, 7)
	_, err := r.client.CreateSnapshot(ctx, id, "s", nil)
	must(t, err)
	target := filepath.Join(r.dir, "clone.qcow2")
	must(t, r.client.Clone(ctx, id, "s", target, 0))
	run(t, "xfs_io", "-x", "-c", "shutdown", r.dir) // what is in the log's memory is lost
	r.eventually("it is detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	r.stop()
	must(t, unix.Unmount(r.dir, 0))
	run(t, "mount", "-o", "loop", r.disk, r.dir)
	r.start()
	f, err := qcow2.OpenFile(target, true)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	got := make([]byte, mib)
	_, err = img.ReadAt(got, 0)
	must(t, err)
	for i, b := range got {
		if b != 7 {
			t.Fatalf("byte %d of the clone is %#x", i, b)
		}
	}
	must(t, os.Remove(target))
}

// Whoever takes a volume over waits for the one before to let go of it, and no one else does.
func TestOutwait(t *testing.T) {
	for _, c := range []struct {
		what    string
		patient bool
		answers []error
		tries   int
		want    error
	}{
		{"free", true, []error{nil}, 1, nil},
		{"in use, and let go", true, []error{pool.ErrInUse, pool.ErrInUse, nil}, 3, nil},
		{"in use, and in no hurry", false, []error{pool.ErrInUse, nil}, 1, pool.ErrInUse},
		{"broken", true, []error{pool.ErrNotFound, nil}, 1, pool.ErrNotFound},
	} {
		t.Run(c.what, func(t *testing.T) {
			tries := 0
			_, err := outwait(testContext(t), c.patient, func() (int, error) {
				tries++
				return 0, c.answers[tries-1]
			})
			if !errors.Is(err, c.want) || tries != c.tries {
				t.Errorf("%v after %d tries", err, tries)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := outwait(ctx, true, func() (int, error) { return 0, pool.ErrInUse })
	wantErr(t, err, pool.ErrInUse)
}

package worker

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

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
			dir := t.TempDir()
			must(t, pool.Init(dir))
			p, err := pool.Open(dir)
			must(t, err)
			v := pool.Volume{ID: p.NewID("a"), Name: "a", Size: 1 << 20, Created: time.Now()}
			must(t, p.Create(t.Context(), v, func(_ context.Context, path string) error {
				f, err := qcow2.CreateFile(path)
				if err != nil {
					return err
				}
				return errors.Join(qcow2.Create(t.Context(), f, v.Size, qcow2.CreateOptions{}), f.Close())
			}))
			lease, err := p.Lock(v.ID)
			must(t, err)
			defer func() { must(t, lease.Unlock()) }()
			must(t, lease.MarkAttached())
			file, err := qcow2.OpenFile(p.ImagePath(v.ID), false)
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
			_, err := outwait(t.Context(), c.patient, func() (int, error) {
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
	if !errors.Is(err, pool.ErrInUse) {
		t.Errorf("it is given up with %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

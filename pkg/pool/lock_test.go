package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestLockExcludes(t *testing.T) {
	p := newPool(t)
	id, other := create(t, p, "one"), create(t, p, "other")

	l := lock(t, p, id)
	want(t, "a second Lock", errOf(p.Lock(id)), ErrInUse)
	want(t, "snapshots of a locked volume", errOf(p.Snapshots(id)), ErrInUse)
	must(t, lock(t, p, other).Unlock())
	must(t, l.Unlock())
	must(t, lock(t, p, id).Unlock())
	want(t, "no such volume", errOf(p.Lock(p.NewID("one"))), ErrNotFound)
}

func TestLockGoesWithItsProcess(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	c := startChild(t, "lock", p, id)
	c.says(t, "locked")
	want(t, "locked by another process", errOf(p.Lock(id)), ErrInUse)
	c.kill()
	must(t, lock(t, p, id).Unlock())
}

func TestProcessesRaceForALock(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	children := make([]*child, 0, 3)
	for range cap(children) {
		c := startChild(t, "race", p, id)
		c.says(t, "ready")
		children = append(children, c)
	}
	for _, c := range children {
		must(t, c.stdin.Close())
	}
	for _, c := range children {
		c.says(t, "PASS")
		must(t, c.cmd.Wait())
	}
}

// A volume that is removed between being found and being locked must not be leased.
func TestLockOfAVolumeJustRemoved(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	d, err := p.openVolume(id)
	must(t, err)
	defer d.Close()

	l := lock(t, p, id)
	must(t, l.Remove(), l.Unlock())

	late, err := lockDir(d, tryExclusive) // as Lock would
	must(t, err)
	defer late.Close()
	parsed, err := ParseID(id)
	must(t, err)
	stale := &Lease{pool: p, id: parsed, dir: d, lock: late}
	want(t, "removed", stale.verify(), ErrNotFound)

	must(t, p.Create(t.Context(), Volume{ID: id, Name: "v"}, fillQCOW2)) // even if there is one again
	want(t, "replaced", stale.verify(), ErrNotFound)
}

func TestManyRemoveOneVolume(t *testing.T) {
	p := newPool(t)
	for range 20 {
		id := create(t, p, "v")
		removed := make(chan string, 8)
		var wg sync.WaitGroup
		for range cap(removed) {
			wg.Go(func() {
				for {
					l, err := p.Lock(id)
					if errors.Is(err, ErrInUse) {
						continue
					}
					if errors.Is(err, ErrNotFound) {
						return
					}
					if err := errors.Join(err, l.Remove(), l.Unlock()); err != nil {
						t.Error(err)
					}
					removed <- id
				}
			})
		}
		wg.Wait()
		if len(removed) != 1 {
			t.Fatalf("a volume was removed %d times", len(removed))
		}
	}
}

// Listing snapshots must not make an attach fail.
func TestLockWaitsForReaders(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	ctx, stop := context.WithCancel(t.Context())
	var reader sync.WaitGroup
	reader.Go(func() {
		for ctx.Err() == nil {
			if _, err := p.Snapshots(id); err != nil && !errors.Is(err, ErrInUse) {
				t.Error(err)
				return
			}
		}
	})
	defer reader.Wait()
	defer stop()
	for range 30 {
		must(t, lock(t, p, id).Unlock())
	}
}

func TestReadersShare(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	reader, err := p.lease(id, tryShared)
	must(t, err)
	must(t, errOf(p.Snapshots(id)))
	must(t, reader.Unlock())
}

func TestLeaseAndQEMUExcludeEachOther(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	f, err := qcow2.OpenFile(p.ImagePath(id), true) // as qemu-img would: QEMU itself is in the tests of pkg/qcow2
	must(t, err)
	l := lock(t, p, id)
	want(t, "open for writing", errOf(l.Open(false)), ErrInUse)
	want(t, "remove", l.Remove(), ErrInUse)
	must(t, f.Close())
	must(t, l.Remove(), l.Unlock())
}

func TestSnapshots(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	l := lock(t, p, id)
	img, err := l.Open(false)
	must(t, err)
	must(t, errOf(img.CreateSnapshot(t.Context(), "first", nil)), errOf(img.CreateSnapshot(t.Context(), "second", nil)), img.Close(), l.Unlock())
	s, err := p.Snapshots(id)
	if err != nil || len(s) != 2 || s[0].Name != "first" || s[1].Name != "second" {
		t.Errorf("snapshots are %v, %v", s, err)
	}
	checkImage(t, p, id)
}

func TestLeaseOpenFollowsNoLink(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	must(t, os.Rename(p.ImagePath(id), filepath.Join(p.Dir(), "elsewhere")), os.Symlink("../../elsewhere", p.ImagePath(id)))
	l := lock(t, p, id)
	for _, readOnly := range []bool{true, false} {
		if img, err := l.Open(readOnly); err == nil {
			t.Error("an image was opened through a link")
			must(t, img.Close())
		}
	}
}

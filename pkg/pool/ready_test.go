package pool

import (
	"context"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// wantNotReady calls every method.
func wantNotReady(t *testing.T, p *Pool, id string) {
	t.Helper()
	fill := func(context.Context, string) error {
		t.Error("a pool that is not ready has called fill")
		return nil
	}
	for call, err := range map[string]error{
		"Ready":      p.Ready(),
		"Volumes":    errOf(p.Volumes()),
		"Volume":     errOf(p.Volume(id)),
		"FindByName": errOf(p.FindByName("v")),
		"Create":     p.Create(t.Context(), newVolume(p, "new"), fill),
		"Clean":      p.Clean(),
		"Lock":       errOf(p.Lock(id)),
		"Snapshots":  errOf(p.Snapshots(id)),
		"Space":      errOf(p.Space(nil)),
		"Mark":       p.Mark(id, Frozen, nil),
		"Unmark":     p.Unmark(id, Frozen),
	} {
		want(t, call, err, ErrNotReady)
	}
	_, _, err := p.Marked(id, Frozen)
	want(t, "Marked", err, ErrNotReady)
}

func TestUnmountedPoolLosesAndCreatesNothing(t *testing.T) {
	path := t.TempDir()
	unmount := mountOver(t, path)
	p := poolIn(t, path)
	id := create(t, p, "v")

	// Another mount on top hides the pool and keeps it, as a disk that is gone does.
	uncover := mountOver(t, path)
	wantNotReady(t, p, id)
	want(t, "Open", errOf(Open(path)), ErrNotReady)
	if got := tree(t, path); len(got) != 0 {
		t.Errorf("the empty directory holds %v now", got)
	}

	poolIn(t, path) // another pool
	create(t, poolIn(t, path), "other")
	before := tree(t, path)
	wantNotReady(t, p, id)
	if got := tree(t, path); !slices.Equal(got, before) {
		t.Errorf("the other pool held %v, holds %v", before, got)
	}

	uncover()
	must(t, p.Ready())
	if got := volumeIDs(t, p); !slices.Equal(got, []string{id}) {
		t.Errorf("volumes: %v", got)
	}

	unmount()
	wantNotReady(t, p, id)
	must(t, os.Remove(path)) // nothing was created in it
	wantNotReady(t, p, id)
	must(t, os.Mkdir(path, 0o700))
}

// A disk cannot be taken away below a lease, unless by force; and then the lease changes nothing but the disk.
func TestLeaseKeepsItsDisk(t *testing.T) {
	path := t.TempDir()
	mountOver(t, path)
	p := poolIn(t, path)
	id := create(t, p, "v")
	l := lock(t, p, id)
	want(t, "unmount", unix.Unmount(path, 0), unix.EBUSY)

	uncover := mountOver(t, path)
	must(t, l.Update(func(v *Volume) { v.Tombstone = true }))
	want(t, "remove", l.Remove(), ErrNotReady)
	if img, err := l.Open(false); err == nil {
		t.Error("opened an image of another disk")
		must(t, img.Close())
	}
	if got := tree(t, path); len(got) != 0 {
		t.Errorf("the empty directory holds %v now", got)
	}
	uncover()
	must(t, l.Unlock())
	if v, err := p.Volume(id); err != nil || !v.Tombstone {
		t.Errorf("the update went elsewhere: %+v, %v", v, err)
	}
}

// The pool goes away while an image is being written.
func TestCreateIsCoveredMidway(t *testing.T) {
	path := t.TempDir()
	mountOver(t, path)
	p := poolIn(t, path)
	var uncover func()
	err := p.Create(t.Context(), newVolume(p, "v"), func(ctx context.Context, image string) error {
		uncover = mountOver(t, path)
		return fillQCOW2(ctx, image)
	})
	if err == nil {
		t.Error("Create has succeeded")
	}
	if got := tree(t, path); len(got) != 0 {
		t.Errorf("the empty directory holds %v now", got)
	}
	uncover()
	if got := tree(t, path); len(got) != 4 {
		t.Errorf("the pool holds %v", got)
	}
}

package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

var errFill = errors.New("cannot fill")

func TestCreate(t *testing.T) {
	p := newPool(t)
	v := newVolume(p, "pvc-1")
	v.Source = "volume:x"
	must(t, p.Create(t.Context(), v, func(ctx context.Context, path string) error {
		if got := volumeIDs(t, p); len(got) != 0 {
			t.Errorf("visible before it is whole: %v", got)
		}
		want(t, "Lock of a half-made volume", errOf(p.Lock(v.ID)), ErrNotFound)
		return fillQCOW2(ctx, path)
	}, Unformatted))
	got, err := p.Volume(v.ID)
	must(t, err)
	if _, set, err := p.Marked(v.ID, Unformatted); err != nil || !set {
		t.Errorf("the mark that was asked for: %v, %v", set, err)
	}
	if got.ID != v.ID || got.Name != v.Name || got.Size != testSize || got.Source != v.Source || got.Tombstone ||
		got.Parameters["clusterSize"] != "65536" || got.Created.IsZero() {
		t.Errorf("the volume is %+v, was %+v", got, v)
	}
	if found, err := p.FindByName("pvc-1"); err != nil || found.ID != v.ID {
		t.Errorf("FindByName = %v, %v", found.ID, err)
	}
	if filepath.Dir(filepath.Dir(filepath.Dir(p.ImagePath(v.ID)))) != p.Dir() {
		t.Errorf("the image is at %s", p.ImagePath(v.ID))
	}
	checkImage(t, p, v.ID)
	wantEmpty(t, p, creatingDir)
}

// wantEmpty wants nothing in a part of the pool.
func wantEmpty(t *testing.T, p *Pool, part string) {
	t.Helper()
	if got := tree(t, filepath.Join(p.Dir(), part)); len(got) != 0 {
		t.Errorf("%s holds %v", part, got)
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	p := newPool(t)
	for name, c := range map[string]struct {
		fill func(ctx context.Context, path string) error
		want error
	}{
		"fill fails": {func(ctx context.Context, path string) error { return errors.Join(fillQCOW2(ctx, path), errFill) }, errFill},
		"no image":   {func(context.Context, string) error { return nil }, os.ErrNotExist},
	} {
		want(t, name, p.Create(t.Context(), newVolume(p, "v"), c.fill), c.want)
		wantEmpty(t, p, creatingDir)
		wantEmpty(t, p, volumesDir)
	}
	ctx, cancel := context.WithCancel(t.Context())
	want(t, "cancelled", p.Create(ctx, newVolume(p, "v"), func(ctx context.Context, path string) error {
		cancel()
		return fillQCOW2(ctx, path)
	}), context.Canceled)
	wantEmpty(t, p, creatingDir)
	wantEmpty(t, p, volumesDir)
	linked := p.Create(t.Context(), newVolume(p, "v"), func(_ context.Context, path string) error {
		return os.Symlink("/etc/passwd", path)
	})
	if linked == nil {
		t.Error("a link was taken for an image")
	}
	wantEmpty(t, p, volumesDir)
}

func TestCreateRefusesIDs(t *testing.T) {
	p, other := newPool(t), newPool(t)
	for what, v := range map[string]Volume{
		"another pool's ID": {ID: other.NewID("v"), Name: "v"},
		"another name's ID": {ID: p.NewID("w"), Name: "v"},
		"no ID":             {Name: "v"},
		"no name":           {ID: p.NewID("")},
		"a path":            {ID: "../../" + p.NewID("v"), Name: "v"},
	} {
		want(t, what, p.Create(t.Context(), v, fillQCOW2), ErrBadID)
	}
	big := newVolume(p, "v")
	big.Parameters = map[string]string{"key": strings.Repeat("v", volumeLimit)}
	if err := p.Create(t.Context(), big, fillQCOW2); err == nil {
		t.Error("a volume.json that cannot be read back was written")
	}
	wantEmpty(t, p, creatingDir)
	wantEmpty(t, p, volumesDir)
}

func TestCreateOneNameOnce(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	want(t, "the name again", p.Create(t.Context(), newVolume(p, "v"), fillQCOW2), ErrExists)
	want(t, "the ID again", p.Create(t.Context(), Volume{ID: id, Name: "v"}, fillQCOW2), ErrExists)

	// A tombstone's name can be used again; its own ID cannot.
	l := lock(t, p, id)
	must(t, l.Update(func(v *Volume) { v.Tombstone = true }), l.Unlock())
	want(t, "FindByName of a tombstone", errOf(p.FindByName("v")), ErrNotFound)
	want(t, "the tombstone's ID", p.Create(t.Context(), Volume{ID: id, Name: "v"}, fillQCOW2), ErrExists)
	again := create(t, p, "v")
	if found, err := p.FindByName("v"); err != nil || found.ID != again {
		t.Errorf("FindByName = %v, %v; want %s", found.ID, err, again)
	}
	if got := volumeIDs(t, p); len(got) != 2 || !slices.IsSorted(got) {
		t.Errorf("volumes: %v", got)
	}
	// Names that look alike in an ID are different names.
	create(t, p, "V")
	create(t, p, "-v-")
}

func TestCreatesAtOnceOfOneNameMakeOneVolume(t *testing.T) {
	p := newPool(t)
	results := make(chan error, 8)
	var filled, begun sync.WaitGroup
	begun.Add(cap(results))
	for range cap(results) {
		filled.Go(func() {
			results <- p.Create(t.Context(), newVolume(p, "v"), func(ctx context.Context, path string) error {
				begun.Done()
				begun.Wait() // all of them have found the name free
				return fillQCOW2(ctx, path)
			})
		})
	}
	filled.Wait()
	close(results)
	succeeded := 0
	for err := range results {
		if err == nil {
			succeeded++
		} else {
			want(t, "Create", err, ErrExists)
		}
	}
	if got := volumeIDs(t, p); succeeded != 1 || len(got) != 1 {
		t.Errorf("%d Creates have succeeded, volumes: %v", succeeded, got)
	}
	wantEmpty(t, p, creatingDir)
}

func TestCreateKilled(t *testing.T) {
	p := newPool(t)
	c := startChild(t, "create", p, "v")
	c.says(t, "filled")

	must(t, p.Clean()) // the other process is alive: hands off
	if got := tree(t, filepath.Join(p.Dir(), creatingDir)); len(got) == 0 {
		t.Error("Clean has removed what another process is creating")
	}
	c.kill()
	if got := volumeIDs(t, p); len(got) != 0 {
		t.Errorf("a half-made volume is visible: %v", got)
	}
	must(t, p.Clean())
	wantEmpty(t, p, creatingDir)
	create(t, p, "v")

	c = startChild(t, "create", p, "w")
	c.says(t, "filled")
	must(t, p.Clean())
	c.finish(t)
	checkImage(t, p, errFree(t)(p.FindByName("w")).ID)
}

func errFree(t *testing.T) func(Volume, error) Volume {
	t.Helper()
	return func(v Volume, err error) Volume {
		t.Helper()
		must(t, err)
		return v
	}
}

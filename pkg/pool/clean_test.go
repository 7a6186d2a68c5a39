package pool

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// copyTree makes a state of the pool that a crash would leave out of a whole volume.
func copyTree(t *testing.T, from, to string, names ...string) {
	t.Helper()
	must(t, os.Mkdir(to, 0o700))
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(from, name))
		must(t, err, os.WriteFile(filepath.Join(to, name), data, 0o600))
	}
}

// Every state between the steps of Create and Remove: nothing of it is seen, Clean removes it, and the rest stays.
func TestCrashStatesAreCleaned(t *testing.T) {
	spare, marker := volumeFile+".spare", string(Clean)
	for name, content := range map[string][]string{
		"directory alone":  {},
		"half a file":      {spare},
		"no image":         {volumeFile, spare},
		"no marker":        {volumeFile, spare, imageFile},
		"whole, unrenamed": {volumeFile, spare, imageFile, marker},
		"image gone":       {volumeFile, marker},
	} {
		for _, part := range []string{creatingDir, removingDir} {
			t.Run(part+", "+name, func(t *testing.T) {
				p := newPool(t)
				id := create(t, p, "other")
				dead := p.NewID("v")
				copyTree(t, filepath.Dir(p.ImagePath(id)), filepath.Join(p.Dir(), part, dead), content...)
				before := tree(t, filepath.Join(p.Dir(), volumesDir))

				p = poolIn(t, p.Dir())
				if got := volumeIDs(t, p); !slices.Equal(got, []string{id}) {
					t.Errorf("volumes before Clean: %v", got)
				}
				want(t, "Volume", errOf(p.Volume(dead)), ErrNotFound)
				want(t, "Lock", errOf(p.Lock(dead)), ErrNotFound)
				want(t, "FindByName", errOf(p.FindByName("v")), ErrNotFound)
				must(t, errOf(p.Space(nil)))
				must(t, p.Clean(), p.Clean())
				wantEmpty(t, p, part)
				if got := tree(t, filepath.Join(p.Dir(), volumesDir)); !slices.Equal(got, before) {
					t.Errorf("volumes were %v, are %v", before, got)
				}
				checkImage(t, p, id)
				create(t, p, "v")
			})
		}
	}
}

// A removal that meets what an earlier one, of the same ID, left.
func TestRemoveOverALeftover(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	put(t, p.Dir(), "removing/"+id+"/", "removing/"+id+"/image.qcow2")
	l := lock(t, p, id)
	must(t, l.Remove(), l.Unlock())
	wantEmpty(t, p, removingDir)
	wantEmpty(t, p, volumesDir)
}

func TestCleanSparesWhatIsBeingRemoved(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	l := lock(t, p, id)
	moved := filepath.Join(p.Dir(), removingDir, id)
	must(t, os.Rename(filepath.Dir(p.ImagePath(id)), moved)) // as Remove has it, between its steps
	must(t, p.Clean())
	if len(tree(t, moved)) == 0 {
		t.Error("Clean was at work on what is locked")
	}
	must(t, l.Unlock(), p.Clean())
	wantEmpty(t, p, removingDir)
}

func TestCleanFollowsNoLinkAndTouchesNothingForeign(t *testing.T) {
	p := newPool(t)
	outside := t.TempDir()
	put(t, outside, "precious")
	link := filepath.Join(p.Dir(), creatingDir, p.NewID("link"))
	inside := filepath.Join(p.Dir(), removingDir, p.NewID("inside"))
	put(t, p.Dir(), "creating/notes.txt", "creating/lost+found/")
	must(t, os.Mkdir(inside, 0o700), os.Symlink(outside, filepath.Join(inside, "a")), os.Symlink(outside, link))
	must(t, p.Clean())
	if got := tree(t, outside); !slices.Equal(got, []string{"precious"}) {
		t.Errorf("outside the pool there is %v", got)
	}
	for _, name := range []string{"notes.txt", "lost+found"} {
		must(t, errOf(os.Stat(filepath.Join(p.Dir(), creatingDir, name))))
	}
	wantEmpty(t, p, removingDir)
}

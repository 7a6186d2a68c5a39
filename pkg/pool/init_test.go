package pool

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestInitIsIdempotent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "some", "pool")
	p := poolIn(t, path)
	id := create(t, p, "v")
	before := tree(t, path)
	again := poolIn(t, path)
	if again.UUID() != p.UUID() || !validUUID(p.UUID()) {
		t.Errorf("UUID was %s, is %s", p.UUID(), again.UUID())
	}
	if got := tree(t, path); !slices.Equal(got, before) {
		t.Errorf("the pool held %v, holds %v", before, got)
	}
	if got := volumeIDs(t, again); !slices.Equal(got, []string{id}) {
		t.Errorf("volumes: %v", got)
	}
}

func TestInitTakesAnEmptyFileSystem(t *testing.T) {
	path := t.TempDir()
	must(t, os.Mkdir(filepath.Join(path, "lost+found"), 0o700))
	poolIn(t, path)
}

func TestInitRefusesWhatIsNotEmpty(t *testing.T) {
	for name, content := range map[string][]string{
		"a file":                  {"README"},
		"a directory":             {"home/"},
		"a hidden file":           {".profile"},
		"a pool without identity": {"volumes/", "creating/", "removing/"},
		"its volumes alone":       {"volumes/"},
		"volumes with volumes":    {"volumes/", "volumes/v-00000000-00000000/"},
		"a foreign interruption":  {unfinishedFile, "README"},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			put(t, path, content...)
			before := tree(t, path)
			if err := Init(path); err == nil {
				t.Error("it was made a pool")
			}
			if got := tree(t, path); !slices.Equal(got, before) {
				t.Errorf("it held %v, holds %v", before, got)
			}
		})
	}
}

// put creates files, and directories where the name ends in a slash.
func put(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			must(t, os.Mkdir(path, 0o700))
		} else {
			must(t, os.WriteFile(path, []byte("content"), 0o600))
		}
	}
}

func TestInitGoesOnAfterACrash(t *testing.T) {
	for name, content := range map[string][]string{
		"identity begun":     {unfinishedFile},
		"some directories":   {unfinishedFile, "lost+found/", "volumes/"},
		"all but the rename": {unfinishedFile, "volumes/", "creating/", "removing/"},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			put(t, path, content...)
			want(t, "Open before Init", errOf(Open(path)), ErrNotReady)
			create(t, poolIn(t, path), "v")
		})
	}
}

func TestInitsAtOnceMakeOnePool(t *testing.T) {
	path := t.TempDir()
	uuids := make(chan string, 8)
	var wg sync.WaitGroup
	for range cap(uuids) {
		wg.Go(func() {
			if err := Init(path); err != nil {
				t.Error(err)
				return
			}
			p, err := Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			uuids <- p.UUID()
		})
	}
	wg.Wait()
	close(uuids)
	first := <-uuids
	for other := range uuids {
		if other != first {
			t.Fatalf("two pools: %s and %s", first, other)
		}
	}
}

func TestDamagedPoolIsNotReady(t *testing.T) {
	write := func(content string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			t.Helper()
			must(t, os.WriteFile(filepath.Join(path, identityFile), []byte(content), 0o600))
		}
	}
	for name, damage := range map[string]func(t *testing.T, path string){
		"empty identity":  write(""),
		"garbage":         write("{{{"),
		"no UUID":         write(`{"version":1}`),
		"malformed UUID":  write(`{"version":1,"uuid":"../../../../../../../../../../../etc"}`),
		"later version":   write(`{"version":2,"uuid":"7f1c0c35-0d0e-4f6c-9a33-2a8d8c2f5a11"}`),
		"another pool":    write(`{"version":1,"uuid":"7f1c0c35-0d0e-4f6c-9a33-2a8d8c2f5a11"}`),
		"huge identity":   write(strings.Repeat(" ", 1<<20)),
		"linked identity": func(t *testing.T, path string) { t.Helper(); relink(t, filepath.Join(path, identityFile)) },
		"linked volumes":  func(t *testing.T, path string) { t.Helper(); relink(t, filepath.Join(path, volumesDir)) },
		"no volumes":      func(t *testing.T, path string) { t.Helper(); must(t, os.RemoveAll(filepath.Join(path, volumesDir))) },
		"no identity":     func(t *testing.T, path string) { t.Helper(); must(t, os.Remove(filepath.Join(path, identityFile))) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t)
			id := create(t, p, "v")
			damage(t, p.Dir())
			before := tree(t, p.Dir())
			wantNotReady(t, p, id)
			if name != "another pool" {
				want(t, "Open", errOf(Open(p.Dir())), ErrNotReady)
				if err := Init(p.Dir()); err == nil {
					t.Error("Init took a damaged pool")
				}
			}
			if got := tree(t, p.Dir()); !slices.Equal(got, before) {
				t.Errorf("it held %v, holds %v", before, got)
			}
		})
	}
}

// relink moves what is at path, and leaves a link to it.
func relink(t *testing.T, path string) {
	t.Helper()
	must(t, os.Rename(path, path+".moved"), os.Symlink(filepath.Base(path)+".moved", path))
}

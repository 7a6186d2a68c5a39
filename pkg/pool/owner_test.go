package pool

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
)

// copyPool copies a pool's directory as administrators do.
func copyPool(t *testing.T, p *Pool) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	runTool(t, "cp", "-a", p.Dir(), to)
	return to
}

// asBefore makes a pool one of the former version, which said nothing of an owner.
func asBefore(t *testing.T, p *Pool) {
	t.Helper()
	data, err := json.Marshal(identity{Version: identityVersion, UUID: p.UUID()})
	must(t, err, os.WriteFile(filepath.Join(p.Dir(), identityFile), data, 0o600))
}

func TestPoolBelongsToOneNode(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, path string){
		"made for it":        func(t *testing.T, path string) { t.Helper(); must(t, InitOn(path, "node-a")) },
		"taken at first use": func(t *testing.T, path string) { t.Helper(); must(t, Init(path)) },
		"of the former version": func(t *testing.T, path string) {
			t.Helper()
			asBefore(t, poolIn(t, path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pool")
			prepare(t, path)
			first, err := OpenOn(path, "node-a")
			must(t, err)
			id := create(t, first, "v")
			must(t, errOf(OpenOn(path, "node-a")), errOf(OpenOn(path, "")))

			_, err = OpenOn(path, "node-b")
			want(t, "OpenOn by another node", err, ErrForeign)
			want(t, "OpenOn by another node", err, ErrNotReady)
			for _, needed := range []string{`"node-a"`, `"node-b"`, "pool adopt " + path, "pool init --new-uuid " + path} {
				if !strings.Contains(err.Error(), needed) {
					t.Errorf("%v: says nothing of %s", err, needed)
				}
			}

			must(t, Adopt(path, ""))
			second, err := OpenOn(path, "node-b")
			must(t, err)
			if got := volumeIDs(t, second); second.UUID() != first.UUID() || !slices.Equal(got, []string{id}) {
				t.Errorf("an adopted pool is %s with %v", second.UUID(), got)
			}
			want(t, "Ready of who had it", first.Ready(), ErrForeign)
			want(t, "Create of who had it", first.Create(t.Context(), newVolume(first, "w"), fillQCOW2), ErrForeign)
			want(t, "Volumes of who had it", errOf(first.Volumes()), ErrForeign)
		})
	}
}

// Of many nodes that open a pool at once for the first time, one gets it.
func TestFirstUsesAtOnce(t *testing.T) {
	p := newPool(t)
	errs := make(chan error, 8)
	var wg sync.WaitGroup
	for i := range cap(errs) {
		wg.Go(func() { errs <- errOf(OpenOn(p.Dir(), string(rune('a'+i)))) })
	}
	wg.Wait()
	close(errs)
	took := 0
	for err := range errs {
		if err == nil {
			took++
		} else if !errors.Is(err, ErrForeign) {
			t.Error(err)
		}
	}
	if took != 1 {
		t.Errorf("%d nodes have the pool", took)
	}
}

func TestCopyIsRefused(t *testing.T) {
	for name, fs := range map[string][]string{
		"ext4":  {"mkfs.ext4", "-q", "-F"},
		"xfs":   {"mkfs.xfs", "-q"},
		"btrfs": {"mkfs.btrfs", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			disk := testfs.Image(t, name, 320<<20, fs...)
			p := poolIn(t, filepath.Join(disk, "pool"))
			create(t, p, "v")
			must(t, errOf(OpenOn(p.Dir(), "node-a")))
			for _, to := range []string{filepath.Join(disk, "copy"), filepath.Join(t.TempDir(), "copy")} {
				runTool(t, "cp", "-a", p.Dir(), to)
				for _, node := range []string{"node-a", "node-b", ""} { // an engine need not know its name
					_, err := OpenOn(to, node)
					want(t, "OpenOn of a copy", err, ErrForeign)
				}
				must(t, Adopt(to, "node-a"))
				must(t, errOf(OpenOn(to, "node-a")))
			}

			moved := filepath.Join(disk, "moved")
			must(t, os.Rename(p.Dir(), moved))
			must(t, errOf(OpenOn(moved, "node-a")))
		})
	}
}

// A file system that is full keeps nobody from his pool.
func TestFirstUseOnAFullFileSystem(t *testing.T) {
	p := poolIn(t, filepath.Join(testfs.Image(t, "ext4", 32<<20, "mkfs.ext4", "-q", "-F", "-m", "0"), "pool"))
	asBefore(t, p)
	ballast := filepath.Join(p.Dir(), "ballast")
	testfs.FillUp(t, ballast)
	served, err := OpenOn(p.Dir(), "node-a")
	must(t, err, served.Ready(), os.Remove(ballast))
	must(t, errOf(OpenOn(p.Dir(), "node-a")))
	want(t, "OpenOn by another node, with space", errOf(OpenOn(p.Dir(), "node-b")), ErrForeign)
}

func TestRenew(t *testing.T) {
	p := newPool(t)
	source := create(t, p, "source")
	v := newVolume(p, "copy")
	v.Source = "snapshot:" + source + "@snap"
	must(t, p.Create(t.Context(), v, fillQCOW2))
	stranger := strings.Replace(source, p.idPart(), "00000000", 1)
	must(t, os.CopyFS(filepath.Join(p.Dir(), volumesDir, stranger), os.DirFS(filepath.Join(p.Dir(), volumesDir, source))))
	must(t, errOf(OpenOn(p.Dir(), "node-a")))
	before := tree(t, p.Dir())
	path := copyPool(t, p)

	must(t, Renew(path, ""))
	renewed, err := OpenOn(path, "node-b")
	must(t, err)
	wantRenewed(t, p, renewed, source, v.ID)
	if got := tree(t, p.Dir()); !slices.Equal(got, before) {
		t.Errorf("the original held %v, holds %v", before, got)
	}
	if _, err := os.Stat(filepath.Join(path, volumesDir, stranger)); err != nil {
		t.Errorf("what was no volume of the pool: %v", err)
	}
}

// wantRenewed checks that the volumes of p are in another pool under IDs of its own.
func wantRenewed(t *testing.T, p, renewed *Pool, ids ...string) {
	t.Helper()
	if renewed.idPart() == p.idPart() {
		t.Errorf("the copy of %s is %s", p.UUID(), renewed.UUID())
	}
	for _, id := range ids {
		old, err := p.Volume(id)
		must(t, err)
		newID := strings.Replace(id, p.idPart(), renewed.idPart(), 1)
		got, err := renewed.Volume(newID)
		must(t, err)
		if got.Name != old.Name || got.Size != old.Size || got.Source != strings.Replace(old.Source, p.idPart(), renewed.idPart(), 1) {
			t.Errorf("%+v became %+v", old, got)
		}
		want(t, "the old ID in the copy", errOf(renewed.Volume(id)), ErrNotFound)
		checkImage(t, renewed, newID)
	}
}

// An interrupted Renew leaves a pool that nobody takes for ready, and goes on.
func TestRenewGoesOn(t *testing.T) {
	for _, state := range []string{"announced", "one described", "one moved"} {
		t.Run(state, func(t *testing.T) {
			p := newPool(t)
			ids := []string{create(t, p, "a"), create(t, p, "b")}
			path := copyPool(t, p)
			root, id, err := enter(path)
			must(t, err)
			defer root.Close()
			id.Successor = newUUID()
			must(t, writeIdentity(root, id))
			r := renewal{root: root, from: id.UUID[:idHexDigits], to: id.Successor[:idHexDigits]}
			all, err := root.sub(volumesDir)
			must(t, err)
			defer all.Close()
			if state != "announced" {
				must(t, r.move(all, ids[0], r.id(ids[0])))
			}
			if state == "one described" {
				must(t, all.Rename(r.id(ids[0]), ids[0]))
			}

			_, err = OpenOn(path, "node-a")
			want(t, "OpenOn", err, ErrNotReady)
			want(t, "Adopt", Adopt(path, "node-a"), ErrNotReady)
			if !strings.Contains(err.Error(), "pool init --new-uuid") {
				t.Errorf("%v: does not say how to go on", err)
			}
			must(t, Renew(path, "node-b"))
			renewed, err := OpenOn(path, "node-b")
			must(t, err)
			if renewed.UUID() != id.Successor {
				t.Errorf("it is %s, was to be %s", renewed.UUID(), id.Successor)
			}
			wantRenewed(t, p, renewed, ids...)
		})
	}
}

func TestRenewWaitsForNobody(t *testing.T) {
	p := newPool(t)
	create(t, p, "v")
	root, _, err := enter(p.Dir())
	must(t, err)
	defer root.Close()
	engine, err := lockEngine(root)
	must(t, err)
	before := tree(t, p.Dir())
	want(t, "Renew beside an engine", Renew(p.Dir(), ""), ErrInUse)
	want(t, "what is no pool", Renew(t.TempDir(), ""), ErrNotReady)
	if got := tree(t, p.Dir()); !slices.Equal(got, before) {
		t.Errorf("it held %v, holds %v", before, got)
	}
	must(t, p.Ready(), engine.Close())
}

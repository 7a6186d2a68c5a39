package pool

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/powercut"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// The histories are what the plugin and the engine do with a pool: their calls of this package, in their order. A step can be
// repeated when it was interrupted.

// facts are what a pool promises: each may be read back after a power cut.
type facts map[string]string

// Facts about the pool; those about a volume are "<what> <ID>".
const (
	factPool    = "pool" // its UUID
	factNode    = "node" // whose it is
	factReserve = "reserve"
)

// readFacts reads all that there is to know of a pool that is in order.
func readFacts(p *Pool) (facts, error) {
	root, id, err := enter(p.path)
	if err != nil {
		return nil, err
	}
	f := facts{factPool: p.UUID(), factNode: id.Node, factReserve: fmt.Sprint(reserved(p))}
	volumes, err := p.Volumes()
	err = errors.Join(err, root.Close())
	for _, v := range volumes {
		failed := func(e error) { err = errors.Join(err, e) }
		description, e := json.Marshal(v)
		failed(e)
		f["volume "+v.ID] = string(description)
		if f["image "+v.ID], e = imageFacts(p, v.ID); e != nil {
			failed(fmt.Errorf("image of %s: %w", v.ID, e))
		}
		for _, m := range []Marker{Clean, Frozen, Unformatted} {
			note, set, e := p.Marked(v.ID, m)
			f[string(m)+" "+v.ID] = fmt.Sprintf("%v %q", set, note)
			failed(e)
		}
		all, e := p.PendingSnapshots(v.ID)
		f["pending "+v.ID] = fmt.Sprint(all)
		failed(e)
	}
	return f, err
}

// reserved returns how many bytes the reserve holds ready.
func reserved(p *Pool) int64 {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(p.Dir(), reserveFile), &st); err != nil {
		return 0
	}
	return min(st.Size, st.Blocks*512)
}

// imageFacts says what an image's disk and its snapshots hold.
func imageFacts(p *Pool, id string) (_ string, err error) {
	l, err := p.Lock(id)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	image, err := l.Open(true)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	content := func(name string, view *qcow2.View) (string, error) {
		data := make([]byte, view.Size())
		_, err := view.ReadAt(data, 0)
		return fmt.Sprintf("%s %d %x", name, view.Size(), sha256.Sum256(data))[:40], errors.Join(err, view.Close())
	}
	active, err := content("", image.Active())
	all := []string{active}
	for _, s := range image.Snapshots() {
		view, err := image.OpenSnapshot(qcow2.ByIDAndName(s.ID, s.Name))
		if err != nil {
			return "", err
		}
		one, err := content(s.Name, view)
		if err != nil {
			return "", err
		}
		all = append(all, one)
	}
	return strings.Join(all, ", "), err
}

// world is where a history takes place: in a process that is traced, beside a pool.
type world struct {
	t    *testing.T
	path string
	p    *Pool

	step   int
	unsure bool // see powerNote
}

// doing notes what is done from now on, and what holds by now.
func (w *world) doing(kind string) {
	w.t.Helper()
	n := powerNote{Doing: kind, Step: w.step, Unsure: w.unsure}
	if w.p != nil {
		var err error
		n.Facts, err = readFacts(w.p)
		must(w.t, err)
	}
	line, err := json.Marshal(n)
	must(w.t, err, errOf(os.Stdout.WriteString(powercut.NotePrefix+string(line))))
}

// powerNote is what a traced process tells about itself.
type powerNote struct {
	Doing string // what begins now
	Step  int
	Facts facts // what holds before; nil if there is no pool
	// Unsure: nobody has been told of them. An earlier process was killed, and its step has not been repeated yet.
	Unsure bool
}

// powerStep is one step of a history.
type powerStep func(w *world)

// start is what the plugin and the engine do with the pool when they start.
func start(w *world) {
	w.open()
	w.unsure = true
	w.doing("start")
	w.unsure = false
	must(w.t, reconcile(w.p))
}

func (w *world) open() {
	w.t.Helper()
	var err error
	w.p, err = Open(w.path)
	must(w.t, err)
}

// reconcile is the part of start that changes the pool.
func reconcile(p *Pool) error { return errors.Join(p.Clean(), p.KeepReserve()) }

func initPool(w *world) {
	w.doing("init")
	must(w.t, Init(w.path))
	w.open()
	w.doing("start")
	must(w.t, reconcile(w.p))
}

// bindTo gives the pool to a node, as the engine does with one of a former version.
func bindTo(node string) powerStep {
	return func(w *world) {
		w.doing("bind")
		must(w.t, Adopt(w.path, node))
	}
}

// id returns the ID of a volume by its CSI name; a tombstone's, by "†name". Empty if there is none.
func (w *world) id(name string) string {
	w.t.Helper()
	volumes, err := w.p.Volumes()
	must(w.t, err)
	bare, dead := strings.CutPrefix(name, "†")
	at := slices.IndexFunc(volumes, func(v Volume) bool { return v.Name == bare && v.Tombstone == dead })
	if at < 0 {
		return ""
	}
	return volumes[at].ID
}

// with runs fn under the lease of a volume, or of its tombstone; not at all if an earlier run of the step has removed it.
func (w *world) with(name string, fn func(l *Lease)) {
	w.t.Helper()
	id := cmp.Or(w.id(name), w.id("†"+name))
	if id == "" {
		return
	}
	l, err := w.p.Lock(id)
	must(w.t, err)
	fn(l)
	must(w.t, l.Unlock())
}

const powerSize = 64 << 10

// fillSmall writes a small image, and leaves it to the pool to sync that.
func fillSmall(ctx context.Context, path string) error {
	f, err := qcow2.CreateFile(path)
	if err != nil {
		return err
	}
	return errors.Join(qcow2.Create(ctx, unsynced{f}, powerSize, qcow2.CreateOptions{ClusterSize: 4096}), f.Close())
}

// unsynced is a file of a fill that does not care.
type unsynced struct{ qcow2.File }

func (unsynced) Sync() error { return nil }

// createVolume makes a volume if there is none of the name.
func createVolume(name, source string, fill func(w *world) func(context.Context, string) error) powerStep {
	return func(w *world) {
		w.doing("create")
		if source != "" {
			w.doing("clone")
		}
		if _, err := w.p.FindByName(name); !errors.Is(err, ErrNotFound) {
			must(w.t, err)
			return
		}
		v := Volume{ID: w.p.NewID(name), Name: name, Size: powerSize, Source: source, Parameters: map[string]string{"clusterSize": "4096"}}
		must(w.t, w.p.Create(w.t.Context(), v, fill(w), Unformatted))
	}
}

func make1(name string) powerStep {
	return createVolume(name, "", func(*world) func(context.Context, string) error { return fillSmall })
}

// refused is a Create of a name that is taken, and one whose fill fails.
func refused(name string) powerStep {
	return func(w *world) {
		w.doing("refused create")
		v := Volume{ID: w.p.NewID(name), Name: name, Size: powerSize}
		want(w.t, "Create", w.p.Create(w.t.Context(), v, fillSmall), ErrExists)
		v = Volume{ID: w.p.NewID(name + "x"), Name: name + "x", Size: powerSize}
		want(w.t, "Create", w.p.Create(w.t.Context(), v, func(ctx context.Context, path string) error {
			return errors.Join(fillSmall(ctx, path), errFill)
		}), errFill)
	}
}

// restore makes a volume of a snapshot of another one.
func restore(name, source, snapshot string) powerStep {
	return createVolume(name, "snapshot:"+snapshot, func(w *world) func(context.Context, string) error {
		return func(ctx context.Context, path string) (err error) {
			w.with(source, func(l *Lease) {
				image, openErr := l.Open(true)
				must(w.t, openErr)
				view, openErr := image.OpenSnapshot(qcow2.ByName(snapshot))
				must(w.t, openErr)
				f, createErr := qcow2.CreateFile(path)
				must(w.t, createErr)
				err = errors.Join(qcow2.Clone(ctx, f, view, powerSize, nil), f.Close(), view.Close(), image.Close())
			})
			return err
		}
	})
}

// change changes an image as the plugin does with one that is not attached, and as a worker that serves it.
func change(kind, name string, fn func(w *world, l *Lease, image *qcow2.Image)) powerStep {
	return func(w *world) {
		w.doing("attach")
		unclean := false
		w.with(name, func(l *Lease) {
			var err error
			unclean, err = l.WasUnclean()
			must(w.t, err, l.MarkAttached())
		})
		w.doing(kind)
		w.with(name, func(l *Lease) {
			image, err := l.Open(false)
			must(w.t, err)
			fn(w, l, image)
			must(w.t, image.Close())
		})
		if !unclean {
			w.doing("detach")
			w.with(name, func(l *Lease) { must(w.t, l.ClearAttached()) })
		}
	}
}

func writeTo(name string, sector int64, value byte) powerStep {
	return change("write", name, func(w *world, _ *Lease, image *qcow2.Image) {
		must(w.t, errOf(image.WriteAt([]byte(strings.Repeat(string(rune(value)), 512)), sector*512)), image.Flush())
	})
}

func expand(name string, size int64) powerStep {
	return change("expand", name, func(w *world, l *Lease, image *qcow2.Image) {
		if image.Size() < size {
			must(w.t, image.Resize(w.t.Context(), size))
		}
		must(w.t, l.Update(func(v *Volume) { v.Grown = size }))
	})
}

// snapshot takes one, and answers before it is whole.
func snapshot(name, snapshot string) powerStep {
	return func(w *world) {
		w.doing("keep reserve")
		must(w.t, w.p.KeepReserve())
		w.doing("promise snapshot")
		id := w.id(name)
		all, err := w.p.PendingSnapshots(id)
		must(w.t, err)
		if !slices.ContainsFunc(all, func(s PendingSnapshot) bool { return s.Name == snapshot }) {
			must(w.t, w.p.AddPendingSnapshot(id, PendingSnapshot{Name: snapshot, Created: time.Unix(1, 0).UTC()}))
		}
		change("snapshot", name, func(w *world, _ *Lease, image *qcow2.Image) {
			if _, err := image.CreateSnapshot(w.t.Context(), snapshot, nil); !errors.Is(err, qcow2.ErrExists) {
				must(w.t, err)
			}
		})(w)
		w.doing("end promise")
		must(w.t, w.p.EndPendingSnapshot(id, snapshot))
	}
}

// lose promises a snapshot that never comes to be.
func lose(name, snapshot string) powerStep {
	return func(w *world) {
		w.doing("promise snapshot")
		must(w.t, w.p.AddPendingSnapshot(w.id(name), PendingSnapshot{Name: snapshot, Created: time.Unix(2, 0).UTC()}))
	}
}

// deleteSnapshot also deletes one that was lost.
func deleteSnapshot(name, snapshot string) powerStep {
	return func(w *world) {
		change("delete snapshot", name, func(w *world, _ *Lease, image *qcow2.Image) {
			if err := image.DeleteSnapshot(w.t.Context(), qcow2.ByName(snapshot)); !errors.Is(err, qcow2.ErrNotFound) {
				must(w.t, err)
			}
		})(w)
		w.doing("end promise")
		must(w.t, w.p.EndPendingSnapshot(w.id(name), snapshot))
	}
}

// remove deletes a volume that has no snapshots, or a tombstone.
func remove(name string) powerStep {
	return func(w *world) {
		w.doing("delete")
		w.with(name, func(l *Lease) { must(w.t, l.Remove()) })
		w.doing("keep reserve")
		must(w.t, w.p.KeepReserve())
	}
}

// bury deletes a volume that has snapshots.
func bury(name string) powerStep {
	return func(w *world) {
		w.doing("tombstone")
		w.with(name, func(l *Lease) { must(w.t, l.Update(func(v *Volume) { v.Tombstone = true })) })
		change("drop active", name, func(w *world, _ *Lease, image *qcow2.Image) { must(w.t, image.DropActive(w.t.Context())) })(w)
	}
}

func mark(name string, m Marker, note string) powerStep {
	return func(w *world) {
		w.doing("mark")
		must(w.t, w.p.Mark(w.id(name), m, []byte(note)))
	}
}

func unmarkStep(name string, m Marker) powerStep {
	return func(w *world) {
		w.doing("unmark")
		must(w.t, w.p.Unmark(w.id(name), m))
	}
}

func giveUpReserve(w *world) {
	w.doing("give up reserve")
	must(w.t, w.p.GiveUpReserve())
	w.doing("keep reserve")
	must(w.t, w.p.KeepReserve())
}

// powerHistories are played on each kind of file system.
func powerHistories() map[string][]powerStep {
	return map[string][]powerStep{
		"volumes": {
			initPool, make1("a"), make1("A"), make1("a"), refused("a"),
			mark("a", Unformatted, "ext4"), writeTo("a", 3, 7), unmarkStep("a", Unformatted),
			expand("a", 2*powerSize),
			mark("a", Frozen, "first"), mark("a", Frozen, "another"), unmarkStep("a", Frozen), unmarkStep("a", Frozen),
			remove("a"), make1("a"), remove("A"), remove("a"),
		},
		"snapshots": {
			initPool, make1("v"), writeTo("v", 1, 1), snapshot("v", "one"), writeTo("v", 1, 2), snapshot("v", "two"), lose("v", "lost"),
			deleteSnapshot("v", "lost"), deleteSnapshot("v", "one"), restore("r", "v", "two"), bury("v"), make1("v"), giveUpReserve,
			remove("†v"), remove("r"),
		},
		"upgrade": {
			start, bindTo("node"), bindTo("another"), writeTo("old", 1, 3), snapshot("old", "one"), make1("new"), mark("old", Frozen, "note"), unmarkStep("old", Frozen),
			expand("old", 2*powerSize), deleteSnapshot("old", "one"), bury("old"), remove("†old"),
		},
	}
}

// formerPool makes the pool of which "upgrade" is the history: as the first versions have left it, which wrote files in
// place and kept neither spares nor a reserve.
func formerPool(t *testing.T, path string) {
	t.Helper()
	const uuid = "5a1e5a1e-0000-4000-8000-000000000001"
	id := "old-5a1e5a1e-00000001"
	volume := filepath.Join(path, volumesDir, id)
	must(t, os.MkdirAll(volume, 0o700), os.Mkdir(filepath.Join(path, creatingDir), 0o700), os.Mkdir(filepath.Join(path, removingDir), 0o700))
	files := map[string]string{
		filepath.Join(path, identityFile): `{"version":1,"uuid":"` + uuid + `"}`,
		filepath.Join(volume, volumeFile): fmt.Sprintf(`{"id":%q,"name":"old","size":%d,"created":"2026-01-01T00:00:00Z"}`, id, powerSize),
	}
	for file, content := range files {
		must(t, os.WriteFile(file, []byte(content), 0o600))
	}
	must(t, fillSmall(t.Context(), filepath.Join(volume, imageFile)))
}

// TestPowerChild is the traced process; by itself it does nothing.
func TestPowerChild(t *testing.T) {
	path, arg := os.Getenv(childPool), os.Getenv(childArg)
	switch os.Getenv(childRole) {
	case "history":
		childHistory(t, path, arg)
	case "start":
		childStarts(t, path)
	}
}

// childHistory plays a history. arg is "<history> <first step> <number of steps> <how>": a process that was killed in that
// step is followed by one that does "nothing" before it repeats the step, or "start".
func childHistory(t *testing.T, path, arg string) {
	t.Helper()
	var name, how string
	var first, count int
	must(t, errOf(fmt.Sscan(arg, &name, &first, &count, &how)))
	w := &world{t: t, path: path, step: first}
	steps := powerHistories()[name]
	switch {
	case how == "nothing":
		w.open()
		w.unsure = true
	case first > 0:
		start(w)
	}
	for _, step := range steps[first:min(first+count, len(steps))] {
		step(w)
		w.step++
		w.unsure = false
	}
	w.doing("end")
}

// childStarts starts on the pools in a directory.
func childStarts(t *testing.T, path string) {
	t.Helper()
	pools, err := os.ReadDir(path)
	must(t, err)
	for i, e := range pools {
		w := &world{t: t, path: filepath.Join(path, e.Name(), "pool"), step: i}
		if _, err := Open(w.path); errors.Is(err, ErrNotReady) {
			initPool(w)
		} else {
			start(w)
		}
		w.doing("end")
	}
}

// leftOver returns what a pool in order does not hold.
func leftOver(path string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == path {
			return err
		}
		rest := strings.Split(p[len(path)+1:], "/")
		base := strings.TrimSuffix(e.Name(), spareSuffix)
		switch {
		case len(rest) == 1 && slices.Contains([]string{identityFile, volumesDir, creatingDir, removingDir, reserveFile}, base):
		case len(rest) == 2 && rest[0] == volumesDir && ValidID(e.Name()):
		case len(rest) == 3 && slices.Contains([]string{volumeFile, string(Clean), string(Frozen), string(Unformatted), string(pending)}, base):
		case len(rest) == 3 && e.Name() == imageFile:
		default:
			found = append(found, p[len(path)+1:])
		}
		return nil
	})
	return found, err
}

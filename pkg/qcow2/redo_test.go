package qcow2

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file kills the process that serves an image, at the calls of its file: all calls so far have been made, what was in
// memory is lost, and so nothing that a guest was told may be missing.

var killHistories = flag.Int("kill-histories", 8, "random histories for TestKill")

// killHistory is a random history with a redo log, and with guests beside the operations on snapshots.
type killHistory struct {
	*history
	log   []uint64
	kills []kill
	busy  sync.Mutex   // held in between: an operation reads the file from several goroutines
	moved atomic.Int64 // requests begun and ended, and calls of the file

	mu    sync.Mutex // guards what follows and what the history knows: a goroutine in the background may kill
	span  [2]int64   // the request under way: whether it was done is open
	whole bool       // so is an operation on the whole disk
	in    bool       // an operation on snapshots is under way
}

// knows changes what is known.
func (h *killHistory) knows(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
	h.moved.Add(1)
}

func (h *killHistory) note(text string, args ...any) {
	h.knows(func() { h.history.note(text, args...) })
}

// flush waits for what the flush releases, too: there is one guest at a time. Nothing is left to be redone then.
func (h *killHistory) flush() {
	h.t.Helper()
	must(h.t, h.img.Flush())
	h.img.commitMu.Lock()
	h.img.commitMu.Unlock() //nolint:gocritic,staticcheck // to wait is all that it is for
	if l := h.img.redo; l.begin() != l.end() {
		h.t.Fatalf("%d records are in the log after a flush", l.end()-l.begin())
	}
}

// kill is what a process left, and what must be found.
type kill struct {
	what    string
	file    *memFile
	log     []uint64
	active  *sparse
	span    [2]int64
	settled []modelSnapshot // those that no operation was changing
}

func newKillHistory(t *testing.T, seed uint64) *killHistory {
	h := &killHistory{history: newHistory(t, seed), log: make([]uint64, MinRedoLog)}
	must(t, h.img.Close())
	h.openWithLog()
	return h
}

func (h *killHistory) openWithLog() {
	h.t.Helper()
	h.img = openRedo(h.t, h.file.reopen(), h.p, h.log)
}

func openRedo(t testing.TB, f *memFile, p modelParams, words []uint64) *Image {
	t.Helper()
	l, err := NewRedoLog(words)
	must(t, err)
	img, err := Open(f, OpenOptions{L2CacheSize: 8 * p.ClusterSize, Redo: l})
	must(t, err)
	return img
}

// guest makes one request.
func (h *killHistory) guest() {
	h.t.Helper()
	h.count++
	off, n := h.history.span()
	h.knows(func() { h.span = [2]int64{off, n} })
	switch h.rng.IntN(6) {
	case 0:
		h.note("%d: zero %#x %#x", h.count, off, n)
		must(h.t, h.img.WriteZeroes(off, n))
		h.knows(func() { h.model.active.zero(off, n) })
	case 1:
		h.note("%d: discard %#x %#x", h.count, off, n)
		must(h.t, h.img.Discard(off, n))
		h.knows(func() { h.model.active.zero(off, n) })
	default:
		h.note("%d: write %#x %#x", h.count, off, n)
		p := stamp(h.count, off, n)
		_, err := h.img.WriteAt(p, off)
		must(h.t, err)
		h.knows(func() { h.model.active.writeAt(p, off) })
	}
	h.knows(func() { h.span = [2]int64{} })
}

func (h *killHistory) step() {
	h.t.Helper()
	switch n := h.rng.IntN(100); {
	case n < 78:
		h.guest()
	case n < 84:
		h.note("flush")
		h.flush()
	case n < 91:
		h.createBeside()
	case n < 96:
		h.deleteBeside()
	default:
		h.gotoAny()
	}
}

func (h *killHistory) createBeside() {
	h.t.Helper()
	if len(h.model.snaps) > 3 {
		return
	}
	h.count++
	name := fmt.Sprintf("s%d", h.count)
	h.note("%d: snapshot %s", h.count, name)
	var content *sparse
	h.knows(func() { h.in = true })
	s, err := h.img.CreateSnapshot(h.t.Context(), name, func(Snapshot) { h.knows(func() { content = h.model.active.clone() }) })
	h.knows(func() { h.in = false })
	if h.tooNarrow(err) {
		return
	}
	must(h.t, err)
	h.knows(func() { h.model.snaps = append(h.model.snaps, modelSnapshot{name, s.ID, content}) })
}

func (h *killHistory) deleteBeside() {
	h.t.Helper()
	i, selector := h.choose()
	if i < 0 {
		return
	}
	h.note("%d: delete %s", h.count, selector)
	gone := h.model.snaps[i]
	h.knows(func() {
		h.model.snaps = slices.Delete(h.model.snaps, i, i+1)
		h.in = true
	})
	err := h.img.DeleteSnapshot(h.t.Context(), selector)
	h.knows(func() { h.in = false })
	if h.tooNarrow(err) {
		h.knows(func() { h.model.snaps = append(h.model.snaps, gone) })
		return
	}
	must(h.t, err)
}

func (h *killHistory) gotoAny() {
	h.t.Helper()
	i, selector := h.choose()
	if i < 0 {
		return
	}
	h.note("%d: goto %s", h.count, selector)
	h.knows(func() { h.whole = true })
	defer h.knows(func() { h.whole = false })
	err := h.img.GotoSnapshot(h.t.Context(), selector)
	if h.tooNarrow(err) {
		return
	}
	must(h.t, err)
	h.knows(func() { h.model.active = h.model.snaps[i].content.clone() })
}

// between kills the process before some of the calls of the file, and lets a guest work beside operations.
func (h *killHistory) between() {
	h.moved.Add(1)
	if !h.busy.TryLock() {
		return
	}
	defer h.busy.Unlock()
	if h.rng.IntN(12) == 0 {
		h.kill()
	}
	h.mu.Lock()
	in := h.in
	h.mu.Unlock()
	if !in || h.rng.IntN(4) != 0 || !h.img.idle() {
		return
	}
	h.guest()
	if h.rng.IntN(4) == 0 {
		h.flush()
	}
}

// kill notes what there is at one instant. In the background, where clusters are reserved for example, it may see several:
// then there is no kill.
func (h *killHistory) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.whole {
		return
	}
	moved := h.moved.Load()
	k := kill{
		what: fmt.Sprintf("after %q", h.history.log[len(h.history.log)-1]),
		file: h.file.clone(), log: slices.Clone(h.log), active: h.model.active.clone(), span: h.span,
		settled: slices.Clone(h.model.snaps),
	}
	if h.moved.Load() == moved {
		h.kills = append(h.kills, k)
	}
}

// judge opens what a killed process left: all that guests were told is there, and they go on.
func (h *killHistory) judge(k kill) {
	t := h.t
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("killed %s, request %x under way", k.what, k.span)
		}
	}()
	img := openRedo(t, k.file, h.p, k.log)
	verifyExcept(t, "the active disk", img, k.active, k.span)
	for _, s := range k.settled {
		v, err := img.OpenSnapshot(ByName(s.name))
		must(t, err)
		verifyExcept(t, s.name, v, s.content, [2]int64{})
		must(t, v.Close())
	}
	if r, err := checkFile(t.Context(), k.file.clone()); err != nil || r.Corruptions > 0 {
		t.Fatalf("check of what was redone: %+v, %v", r, err)
	}
	// Another kill, at once: the log is as good as before.
	off := min(h.g.ClusterSize, k.active.size/2)
	p := stamp(1<<20, off, min(2*h.g.ClusterSize, k.active.size-off))
	_, err := img.WriteAt(p, off)
	must(t, err)
	k.active.writeAt(p, off)
	img = openRedo(t, k.file.clone(), h.p, k.log)
	verifyExcept(t, "after another kill", img, k.active, k.span)
	must(t, img.Close())
	if r, err := checkFile(t.Context(), img.f.File.(*memFile).reopen()); err != nil || r.Corruptions > 0 {
		t.Fatalf("check at the end: %+v, %v", r, err)
	}
}

type readerAt interface {
	ReadAt(p []byte, off int64) (int, error)
}

// verifyExcept compares all but a span with what is wanted.
func verifyExcept(t testing.TB, what string, r readerAt, want *sparse, except [2]int64) {
	t.Helper()
	const piece = 256 << 10
	got := make([]byte, piece)
	for off := int64(0); off < want.size; off += piece {
		p := got[:min(piece, want.size-off)]
		if _, err := r.ReadAt(p, off); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		expected := make([]byte, len(p))
		want.readAt(expected, off)
		if from, to := max(except[0], off), min(except[0]+except[1], off+int64(len(p))); from < to {
			copy(p[from-off:to-off], expected[from-off:to-off])
		}
		if i := difference(p, expected); i >= 0 {
			t.Fatalf("%s: byte %#x is %#x, want %#x", what, off+int64(i), p[i], expected[i])
		}
	}
}

func TestKill(t *testing.T) {
	kills := 0
	for seed := range uint64(*killHistories) {
		h := newKillHistory(t, seed)
		h.file.between = h.between
		for range h.p.ops {
			h.step()
		}
		h.file.between = nil
		rng := rand.New(rand.NewPCG(seed, 1))
		rng.Shuffle(len(h.kills), func(i, j int) { h.kills[i], h.kills[j] = h.kills[j], h.kills[i] })
		for _, k := range h.kills[:min(len(h.kills), 12)] {
			h.judge(k)
			kills++
		}
		must(t, h.img.Close())
		h.cleanCheck()
	}
	t.Logf("%d kills", kills)
}

// A log that fills up is emptied by a commit.
func TestRedoLogFull(t *testing.T) {
	h := newKillHistory(t, 3)
	c := h.g.ClusterSize
	l := h.img.redo
	for i := int64(0); l.end() < 3*l.capacity()/2; i++ {
		off := i * 7 % (h.model.active.size / c) * c
		n := min(c, h.model.active.size-off)
		must(t, h.img.Discard(off, n))
		p := stamp(int(i), off, min(512, n))
		_, err := h.img.WriteAt(p, off)
		must(t, err)
		h.model.active.zero(off, n)
		h.model.active.writeAt(p, off)
	}
	if l.begin() == 0 {
		t.Fatal("no commit has emptied the log")
	}
	h.note("many writes")
	h.kill()
	h.judge(h.kills[0])
}

// What a log held is void once it has been redone: whatever comes next, without any write that would empty the log, is not
// taken back by the next process that finds it.
func TestRedoOnce(t *testing.T) {
	for name, c := range map[string]struct {
		op   func(*Image) error
		want byte
	}{
		"goto": {func(img *Image) error { return img.GotoSnapshot(t.Context(), ByName("old")) }, 1},
		"drop": {func(img *Image) error { return img.DropActive(t.Context()) }, 0},
		"flush, goto": {func(img *Image) error {
			_, err := img.WriteAt(bytes.Repeat([]byte{3}, 3*4096), 4096)
			return errors.Join(err, img.Flush(), img.GotoSnapshot(t.Context(), ByName("old")))
		}, 1},
		"create":    {func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "new", nil); return err }, 2},
		"grow":      {func(img *Image) error { return img.Resize(t.Context(), 2<<20) }, 2},
		"reclaim":   {func(img *Image) error { _, err := img.ReclaimLeaks(t.Context()); return err }, 2},
		"no change": {func(*Image) error { return nil }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			f, words := newMemFile("once"), make([]uint64, MinRedoLog)
			p := modelParams{CreateOptions: CreateOptions{ClusterSize: 4096}}
			must(t, Create(t.Context(), f, 1<<20, p.CreateOptions))
			img := openRedo(t, f, p, words)
			put := func(b byte) {
				_, err := img.WriteAt(bytes.Repeat([]byte{b}, 3*4096), 4096)
				must(t, err)
			}
			put(1)
			_, err := img.CreateSnapshot(t.Context(), "old", nil)
			must(t, err)
			put(2) // and the process dies

			img = openRedo(t, f.clone(), p, words)
			must(t, c.op(img)) // and the next one, too
			f = img.f.File.(*memFile).clone()
			img = openRedo(t, f, p, words)
			got := make([]byte, 3*4096)
			_, err = img.ReadAt(got, 4096)
			must(t, err)
			if !bytes.Equal(got, bytes.Repeat([]byte{c.want}, len(got))) {
				t.Errorf("the disk holds %d, not %d", got[0], c.want)
			}
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.Corruptions > 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// An entry of a log is COPIED if its cluster is counted once, whatever the log says: nothing that a log can hold makes a guest
// write to what a snapshot has.
func TestRedoOfSharedCluster(t *testing.T) {
	f, words := newMemFile("shared"), make([]uint64, MinRedoLog)
	p := modelParams{CreateOptions: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}}
	must(t, Create(t.Context(), f, 1<<20, p.CreateOptions))
	img := openRedo(t, f, p, words)
	_, err := img.WriteAt(pattern(1, 512), 0)
	must(t, err)
	_, err = img.CreateSnapshot(t.Context(), "s", nil)
	must(t, err)
	es, err := img.entries(format.Chunk{Off: 0, N: 512})
	must(t, err)
	e := es[0].WithCopied(true)
	e.Sub = e.Sub.With(img.g.SubMask(0, img.g.ClusterSize)) // else it is what is mapped already
	must(t, img.alloc.endReservation())
	l := img.redo
	l.note(img.g, 0, []format.L2Entry{e}) // and the process dies

	img = openRedo(t, f.clone(), p, words)
	f = img.f.File.(*memFile)
	if r, err := checkFile(t.Context(), f.clone()); err != nil || r.Corruptions > 0 {
		t.Errorf("after it was redone: %+v, %v", r, err)
	}
	_, err = img.WriteAt(pattern(2, 16<<10), 0)
	must(t, err)
	v, err := img.OpenSnapshot(ByName("s"))
	must(t, err)
	got := make([]byte, 512)
	_, err = v.ReadAt(got, 0)
	must(t, err)
	if difference(got, pattern(1, 512)) >= 0 {
		t.Error("a write to the disk changes the snapshot")
	}
	must(t, v.Close())
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.Corruptions > 0 {
		t.Errorf("at the end: %+v, %v", r, err)
	}
}

func TestBadRedoLog(t *testing.T) {
	if _, err := NewRedoLog(make([]uint64, MinRedoLog-1)); err == nil {
		t.Error("a short log was taken")
	}
	words := make([]uint64, MinRedoLog)
	words[0] = redoMagic + 1
	if _, err := NewRedoLog(words); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a log of another version: %v", err)
	}
	for name, damage := range map[string]func(words []uint64){
		"begin behind end": func(w []uint64) { w[redoBegin] = 5 },
		"too many records": func(w []uint64) { w[redoEnd] = 1 << 40 },
		"another cluster":  func(w []uint64) { w[redoCluster] = 3 },
		"no clusters":      func(w []uint64) { w[redoEnd] = 1 },
		"across tables":    func(w []uint64) { w[redoEnd] = 1; w[redoHeader+1] = 1 << 40 },
		"behind the disk":  func(w []uint64) { w[redoEnd] = 1; w[redoHeader] = 1 << 50; w[redoHeader+1] = 1 },
		"a free cluster": func(w []uint64) {
			w[redoEnd] = 1
			w[redoHeader+1] = 1
			w[redoHeader+2] = 1 << 30
			w[redoHeader+3] = uint64(format.SubAllocated)
		},
		"an odd descriptor": func(w []uint64) {
			w[redoEnd] = 1
			w[redoHeader+1] = 1
			w[redoHeader+2] = 512
			w[redoHeader+3] = uint64(format.SubAllocated)
		},
		"compressed": func(w []uint64) { w[redoEnd] = 1; w[redoHeader+1] = 1; w[redoHeader+2] = format.FlagCompressed },
	} {
		f := newMemFile("bad")
		must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
		words := make([]uint64, MinRedoLog)
		words[0] = redoMagic
		damage(words)
		l, err := NewRedoLog(words)
		if err == nil {
			_, err = Open(f, OpenOptions{Redo: l})
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
			t.Errorf("%s: check: %+v, %v", name, r, err)
		}
	}
}

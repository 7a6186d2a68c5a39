package pool

import (
	"bytes"
	"path/filepath"
	"testing"
)

func TestUncleanStop(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	unclean := func() bool {
		t.Helper()
		l := lock(t, p, id)
		unclean, err := l.WasUnclean()
		must(t, err, l.Unlock())
		return unclean
	}
	if unclean() {
		t.Error("a new volume is not clean")
	}
	l := lock(t, p, id)
	must(t, l.MarkAttached(), l.MarkAttached(), l.Unlock()) // and never detached
	if !unclean() {
		t.Error("an unclean stop left no mark")
	}
	l = lock(t, p, id)
	must(t, l.ClearAttached(), l.ClearAttached(), l.Unlock())
	if unclean() {
		t.Error("a clean detach left the mark")
	}
}

func TestMarkers(t *testing.T) {
	p := newPool(t)
	id, other := create(t, p, "v"), create(t, p, "other")
	lock(t, p, id) // a marker is another matter than the lease
	isSet := func(id string, note string, set bool) {
		t.Helper()
		got, ok, err := p.Marked(id, Frozen)
		must(t, err)
		if ok != set || !bytes.Equal(got, []byte(note)) {
			t.Errorf("marker of %s: %t %q, want %t %q", id, ok, got, set, note)
		}
	}
	must(t, p.Unmark(id, Frozen))
	isSet(id, "", false)
	must(t, p.Mark(id, Frozen, []byte("/dev/loop12345")))
	isSet(id, "/dev/loop12345", true)
	must(t, p.Mark(id, Frozen, []byte("short")))
	isSet(id, "short", true)
	isSet(other, "", false)
	must(t, p.Unmark(id, Frozen), p.Unmark(id, Frozen))
	isSet(id, "", false)

	relinkless := filepath.Join(filepath.Dir(p.ImagePath(id)), string(Frozen))
	must(t, p.Mark(id, Frozen, nil))
	relink(t, relinkless)
	if _, _, err := p.Marked(id, Frozen); err == nil {
		t.Error("a linked marker was followed")
	}
	none := p.NewID("none")
	_, _, err := p.Marked(none, Frozen)
	want(t, "Marked", err, ErrNotFound)
	want(t, "Mark", p.Mark(none, Frozen, nil), ErrNotFound)
	want(t, "Unmark", p.Unmark(none, Frozen), ErrNotFound)
}

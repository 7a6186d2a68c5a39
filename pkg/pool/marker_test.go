package pool

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
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

func TestPendingSnapshots(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	want := func(names ...string) {
		t.Helper()
		all, err := p.PendingSnapshots(id)
		must(t, err)
		var got []string
		for _, s := range all {
			got = append(got, s.Name)
		}
		if !slices.Equal(got, names) {
			t.Errorf("pending: %q, want %q", got, names)
		}
	}
	want()
	must(t, p.EndPendingSnapshot(id, "a"))
	must(t, p.AddPendingSnapshot(id, PendingSnapshot{Name: "a", Created: time.Unix(1, 0)}))
	must(t, p.AddPendingSnapshot(id, PendingSnapshot{Name: "b", Created: time.Unix(2, 0)}))
	must(t, p.AddPendingSnapshot(id, PendingSnapshot{Name: "b", Created: time.Unix(3, 0)}))
	want("a", "b")
	if all, _ := p.PendingSnapshots(id); !all[1].Created.Equal(time.Unix(3, 0)) {
		t.Errorf("the time of b is %v", all[1].Created)
	}
	var err error
	for i := 0; err == nil; i++ {
		err = p.AddPendingSnapshot(id, PendingSnapshot{Name: fmt.Sprintf("%0200d", i)})
	}
	if !errors.Is(err, qcow2.ErrLimit) {
		t.Errorf("too many: %v", err)
	}
	all, err := p.PendingSnapshots(id)
	must(t, err)
	for _, s := range all[1:] {
		must(t, p.EndPendingSnapshot(id, s.Name))
	}
	want("a")
	must(t, p.EndPendingSnapshot(id, "a"))
	want()
	if _, set, err := p.Marked(id, pending); set || err != nil {
		t.Errorf("the marker stays: %v", err)
	}
}

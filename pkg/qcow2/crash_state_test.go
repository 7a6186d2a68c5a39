package qcow2

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file says what an image may hold after a crash, and what one does hold.

// patch is a guest write; without data, of zeros.
type patch struct {
	off, n int64
	data   []byte
}

func (p patch) apply(s *sparse) {
	if p.data == nil {
		s.zero(p.off, p.n)
	} else {
		s.writeAt(p.data, p.off)
	}
}

// crashState is what an image may be after a crash.
type crashState struct {
	snaps   []modelSnapshot
	durable *sparse // the active disk, as far as it was promised
	pending []patch // guest writes that may be there or not, each sector by itself, the latest of them last
}

// settled returns the state with everything pending made durable.
func (s crashState) settled() crashState {
	s.durable = s.durable.clone()
	for _, p := range s.pending {
		p.apply(s.durable)
	}
	s.pending = nil
	return s
}

// crashOp is one operation of a history: which calls of the file it made, and what it does to the state.
type crashOp struct {
	kind       opKind
	what       string
	begin, end int
	touches    touched  // the clusters that it is about
	events     []string // amid which a crash in it is

	patch  *patch            // a guest's write,
	settle bool              // or all that is pending becomes durable,
	change func(*crashState) // and then this
}

func (o *crashOp) apply(s crashState) crashState {
	s.snaps = slices.Clone(s.snaps)
	if o.patch != nil {
		s.pending = append(slices.Clone(s.pending), *o.patch)
	}
	if o.settle {
		s = s.settled()
	}
	if o.change != nil {
		o.change(&s)
	}
	return s
}

// besideOp is an operation on snapshots that guests did not wait for.
type besideOp struct {
	crashOp
	snaps []modelSnapshot // listed afterwards
}

// timeline is what was done to an image from a state on: one operation after the other, and others beside them.
type timeline struct {
	first  crashState
	ops    []crashOp
	beside []besideOp
}

// cursor walks along a timeline.
type cursor struct {
	*timeline
	state crashState // after the ops that have ended
	next  int        // the first op that has not
}

func (l *timeline) cursor() *cursor { return &cursor{timeline: l, state: l.first} }

// at returns what the image may be after n calls of the file, and which operations a crash there interrupts: those that
// had begun, or if there are none those that ended just then. n does not fall.
func (c *cursor) at(n int) (allowed []crashState, running []*crashOp) {
	for c.next < len(c.ops) && c.ops[c.next].end <= n {
		c.state = c.ops[c.next].apply(c.state)
		c.next++
	}
	allowed = []crashState{c.state}
	if c.next < len(c.ops) && c.ops[c.next].begin < n {
		op := &c.ops[c.next]
		allowed = append(allowed, op.apply(c.state))
		running = append(running, op)
	}
	allowed, running = c.withBeside(n, allowed, running)
	for i := c.next - 1; i >= 0 && len(running) == c.next-1-i && c.ops[i].end == n; i-- {
		running = append(running, &c.ops[i])
	}
	return allowed, running
}

func (c *cursor) withBeside(n int, allowed []crashState, running []*crashOp) ([]crashState, []*crashOp) {
	if len(c.beside) == 0 {
		return allowed, running
	}
	lists := [][]modelSnapshot{c.first.snaps}
	for i := range c.beside {
		switch op := &c.beside[i]; {
		case op.end <= n:
			lists = [][]modelSnapshot{op.snaps}
		case op.begin < n:
			lists = append(lists, op.snaps)
			running = append(running, &op.crashOp)
		}
	}
	var all []crashState
	for _, s := range allowed {
		for _, s.snaps = range lists {
			all = append(all, s)
		}
	}
	return all, running
}

// history tells what was done, for whoever must find a mistake.
func (l *timeline) history() string {
	var b strings.Builder
	for _, o := range l.ops {
		fmt.Fprintf(&b, "%d-%d %s\n", o.begin, o.end, o.what)
	}
	for _, o := range l.beside {
		fmt.Fprintf(&b, "beside: %d-%d %s\n", o.begin, o.end, o.what)
	}
	return b.String()
}

// observation is what an image holds.
type observation struct {
	active []byte
	snaps  []observedSnapshot
}

type observedSnapshot struct {
	name    string
	content []byte
}

// observe reads all of an image. It reuses the memory of the observation before.
func (o *observation) observe(img *Image) error {
	o.active = resized(o.active, img.Size())
	if _, err := img.ReadAt(o.active, 0); err != nil {
		return err
	}
	snapshots := img.Snapshots()
	o.snaps = slices.Grow(o.snaps[:0], len(snapshots))[:len(snapshots)]
	for i, s := range snapshots {
		v, err := img.OpenSnapshot(ByName(s.Name))
		if err != nil {
			return err
		}
		snap := &o.snaps[i]
		snap.name, snap.content = s.Name, resized(snap.content, v.Size())
		_, err = v.ReadAt(snap.content, 0)
		_ = v.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func resized(b []byte, n int64) []byte { return slices.Grow(b[:0], int(n))[:n] }

// state returns the observation as what is promised from now on.
func (o *observation) state() crashState {
	s := crashState{durable: newSparse()}
	s.durable.writeAt(o.active, 0)
	for _, snap := range o.snaps {
		content := newSparse()
		content.writeAt(snap.content, 0)
		s.snaps = append(s.snaps, modelSnapshot{name: snap.name, content: content})
	}
	return s
}

// differs says how an image differs from the state, "" if it does not.
func (s *crashState) differs(o *observation) string {
	if w := s.snapshotsDiffer(o); w != "" {
		return w
	}
	size := int64(len(o.active))
	if size != s.durable.size {
		return fmt.Sprintf("a disk of %d bytes, not %d", size, s.durable.size)
	}
	for at := int64(0); at < size; {
		i := s.durable.differs(o.active[at:], at)
		if i < 0 {
			return ""
		}
		at = (at + i) &^ (format.SectorSize - 1)
		if !s.mayHold(at, o.active[at:at+format.SectorSize]) {
			return fmt.Sprintf("the active disk is wrong at %#x", at)
		}
		at += format.SectorSize
	}
	return ""
}

func (s *crashState) snapshotsDiffer(o *observation) string {
	if len(o.snaps) != len(s.snaps) {
		return fmt.Sprintf("%d snapshots, not %d", len(o.snaps), len(s.snaps))
	}
	for i, want := range s.snaps {
		got := o.snaps[i]
		switch {
		case got.name != want.name:
			return fmt.Sprintf("snapshot %q, not %q", got.name, want.name)
		case int64(len(got.content)) != want.content.size:
			return fmt.Sprintf("snapshot %q has %d bytes, not %d", want.name, len(got.content), want.content.size)
		}
		if i := want.content.differs(got.content, 0); i >= 0 {
			return fmt.Sprintf("snapshot %q is wrong at %#x", want.name, i)
		}
	}
	return ""
}

// mayHold tells whether a pending write wrote such a sector.
func (s *crashState) mayHold(at int64, sector []byte) bool {
	for _, p := range s.pending {
		if at < p.off || at >= p.off+p.n {
			continue
		}
		if p.data == nil && isZero(sector) ||
			p.data != nil && bytes.Equal(sector, p.data[at-p.off:at-p.off+format.SectorSize]) {
			return true
		}
	}
	return false
}

// matches tells whether the image holds one of the states; if not, wrong says how it differs from each.
func matches(o *observation, allowed []crashState) (ok bool, wrong []string) {
	for i := range allowed {
		w := allowed[i].differs(o)
		if w == "" {
			return true, nil
		}
		wrong = append(wrong, w)
	}
	return false, wrong
}

package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file judges what a crash left: it must be clean but for leaks, hold what was promised, and stay so when somebody
// goes on from there.

// judge looks at the crashes of one history.
type judge struct {
	t     testing.TB
	y     *crashTally
	rng   *rand.Rand
	plan  crashPlan
	level int
	log   *crashLog
	*timeline
	events []string
	got    observation // of the crash being judged
}

// crashPlan says how much is tried.
type crashPlan struct {
	share    int // of the moments one in so many is tried
	versions int // of what was not synced, at each
	// Of the crashes one in so many is
	check  int // shown to `qemu-img check`
	goOn   int // continued by us, and crashed again while that goes on; half as many are repaired, and crash then
	second int // of these second crashes, one moment in so many
	qemu   int // continued by QEMU
}

// one tells whether a crash is the one in n.
func (j *judge) one(n int) bool { return n > 0 && j.rng.IntN(n) == 0 }

// crash tries the crashes of a history, and of the clones that were made in it.
func (h *crashHistory) crash(t testing.TB, y *crashTally, plan crashPlan) {
	t.Helper()
	j := &judge{t: t, y: y, rng: h.rng, plan: plan, level: h.level, log: h.log, timeline: &h.timeline, events: h.events}
	cursor := h.cursor()
	for c := range h.log.crashes(j.rng, j.moments(&h.timeline)) {
		allowed, running := cursor.at(c.calls)
		j.judge(c, allowed, running)
	}
	for i := range h.clones {
		j.clone(&h.clones[i])
	}
}

// moments chooses when to crash: in each operation once, and otherwise as often as the plan says.
func (j *judge) moments(l *timeline) func(n int) int {
	if j.plan.share <= 1 {
		return func(int) int { return j.plan.versions }
	}
	chosen := map[int]bool{}
	once := func(op *crashOp) {
		for range 1 + 3*len(op.events) { // growth is rare
			if j.level == 1 || j.one(j.plan.share) {
				chosen[min(op.begin+1+j.rng.IntN(max(op.end-op.begin, 1)), op.end)] = true
			}
		}
	}
	for i := range l.ops {
		once(&l.ops[i])
	}
	for i := range l.beside {
		once(&l.beside[i].crashOp)
	}
	return func(n int) int {
		if chosen[n] || j.one(j.plan.share) {
			return j.plan.versions
		}
		return -1
	}
}

// fail ends the test with what there is to know about a crash.
func (j *judge) fail(c crash, running []*crashOp, f *memFile, text string, args ...any) {
	j.t.Helper()
	j.y.add(running, func(r *crashRow) { r.findings++ })
	path := tempImage(j.t)
	f.save(j.t, path)
	last := "none"
	if c.calls > 0 {
		last = j.log.calls[c.calls-1].String()
	}
	j.t.Fatalf("crash after %d of %d calls (%s; last: %s), level %d: %s\nqemu-img check: %s\n%s", c.calls, len(j.log.calls), c.kind, last,
		j.level, fmt.Sprintf(text, args...), runQemuCheck(j.t, path).output, j.history())
}

// judge checks one crash.
func (j *judge) judge(c crash, allowed []crashState, running []*crashOp) {
	j.t.Helper()
	events := j.events
	for _, op := range running {
		events = append(events[:len(events):len(events)], op.events...)
	}
	j.y.crash(c, running, j.level, events)
	r, err := checkFile(j.t.Context(), c.file)
	if err != nil || r.Corruptions != 0 {
		j.fail(c, running, c.file, "our check: %+v, %v", r, err)
	}
	if j.one(j.plan.check) {
		j.y.add(running, func(r *crashRow) { r.check++ })
		path := tempImage(j.t)
		c.file.save(j.t, path)
		if r := runQemuCheck(j.t, path); r.exit != 0 && r.exit != 3 {
			j.fail(c, running, c.file, "qemu-img check exits %d", r.exit)
		}
	}
	file := c.file.clone()
	if c.calls%8 != 0 { // the opening would verify what has just been checked
		file.disguise()
	}
	img, err := Open(file, OpenOptions{})
	if err != nil {
		j.fail(c, running, c.file, "%v", err)
	}
	got := &j.got
	if err := got.observe(img); err != nil { // and never closed: it dies
		j.fail(c, running, c.file, "%v", err)
	}
	if ok, wrong := matches(got, allowed); !ok {
		j.fail(c, running, c.file, "the content is none of those allowed: %q", wrong)
	}
	if j.level == 1 && j.one(j.plan.goOn) {
		j.y.add(running, func(r *crashRow) { r.ours++ })
		j.goOn(c, got, events, r.Leaks > 0)
	}
	if j.level == 1 && r.Leaks > 0 && j.one(2*j.plan.goOn) {
		j.repair(c, got, events)
	}
	if j.one(j.plan.qemu) {
		j.y.add(running, func(r *crashRow) { r.qemu++ })
		if w := j.goOnQEMU(c.file, got); w != "" {
			j.fail(c, running, c.file, "then QEMU: %s", w)
		}
	}
}

// goOn opens what a crash left and works with it. Nothing may change but by that, and it may crash again at any moment
// from the opening on.
func (j *judge) goOn(c crash, got *observation, events []string, leaks bool) {
	j.t.Helper()
	if leaks {
		events = append(events[:len(events):len(events)], leaksFirst)
	}
	img, err := Open(c.file.clone(), OpenOptions{ReadOnly: true})
	must(j.t, err)
	h := &crashHistory{
		t: j.t, rng: j.rng, level: 2, g: img.g, events: events, file: c.file.clone(), state: got.state(), count: 1 << 16,
		turn: j.rng.IntN(3 * touchKinds),
	}
	must(j.t, img.Close())
	h.restart()
	h.ops = append(h.ops, crashOp{what: fmt.Sprintf("after %d calls (%s) of\n%s", c.calls, c.kind, j.history())})
	h.open()
	h.ops = append(h.ops, crashOp{what: "open", end: h.file.position()})
	for range 3 {
		h.guest()
	}
	if leaks && j.one(2) {
		(&besideHistory{crashHistory: h}).reclaim()
	} else {
		for range 5 {
			h.step()
		}
	}
	h.end()
	if r, err := checkFile(j.t.Context(), h.file.reopen()); err != nil || r.Corruptions != 0 {
		j.t.Fatalf("crash after %d calls (%s), then writes: our check: %+v, %v\n%s", c.calls, c.kind, r, err, h.history())
	}
	plan := j.plan
	plan.share = plan.second
	if plan.share > 0 {
		h.crash(j.t, j.y, plan)
	}
}

// repair gives back what a crash leaked, or rebuilds all counts, and crashes that.
func (j *judge) repair(c crash, got *observation, events []string) {
	j.t.Helper()
	f := c.file.clone()
	log := f.record()
	kind := []RepairKind{RepairLeaks, RepairAll}[j.rng.IntN(2)]
	r, err := Repair(j.t.Context(), f, kind, nil)
	if err != nil || r.Left.ExitStatus() != 0 {
		j.t.Fatalf("crash after %d calls (%s), then repair: %+v, %v\n%s", c.calls, c.kind, r, err, j.history())
	}
	op := crashOp{
		kind: opRepair, what: fmt.Sprintf("repair after %d calls (%s) of\n%s", c.calls, c.kind, j.history()), end: f.position(), settle: true,
		touches: j.touches(f),
	}
	l := &timeline{first: got.state(), ops: []crashOp{op}}
	again := &judge{t: j.t, y: j.y, rng: j.rng, plan: j.plan, level: 2, log: log, timeline: l, events: append(events[:len(events):len(events)], leaksFirst)}
	again.plan.share = min(j.plan.second, 3)
	cursor := l.cursor()
	for c := range log.crashes(j.rng, again.moments(l)) {
		allowed, running := cursor.at(c.calls)
		again.judge(c, allowed, running)
	}
}

// touches returns the kinds of the active disk's clusters.
func (j *judge) touches(f *memFile) touched {
	j.t.Helper()
	img, err := Open(f.clone(), OpenOptions{ReadOnly: true})
	must(j.t, err)
	h := &crashHistory{t: j.t, g: img.g, img: img}
	defer img.Close()
	return h.kinds(0, img.Size())
}

// goOnQEMU lets QEMU write to what a crash left, and says what is wrong then. Snapshots must not change, nor the disk
// where QEMU did not write.
func (j *judge) goOnQEMU(f *memFile, got *observation) string {
	j.t.Helper()
	path := tempImage(j.t)
	f.save(j.t, path)
	state := got.state()
	size := int64(len(got.active))
	var commands []string
	for range 8 {
		p := patch{off: j.rng.Int64N(size/format.SectorSize) * format.SectorSize}
		p.n = min(size-p.off, (1+j.rng.Int64N(8))*format.SectorSize)
		command := []string{"write -P 9", "write -z", "write -z -u"}[j.rng.IntN(3)]
		if command == "write -P 9" {
			p.data = make([]byte, p.n)
			for i := range p.data {
				p.data[i] = 9
			}
		}
		p.apply(state.durable)
		commands = append(commands, fmt.Sprintf("%s %d %d", command, p.off, p.n))
	}
	qemuIO(j.t, path, commands...)
	if r := runQemuCheck(j.t, path); r.exit != 0 && r.exit != 3 {
		return fmt.Sprintf("%q: qemu-img check exits %d: %s", commands, r.exit, r.output)
	}
	img, err := Open(loadMemFile(j.t, path), OpenOptions{ReadOnly: true})
	if err != nil {
		return fmt.Sprintf("%q: %v", commands, err)
	}
	defer img.Close()
	var now observation
	if err := now.observe(img); err != nil {
		return fmt.Sprintf("%q: %v", commands, err)
	}
	if w := state.differs(&now); w != "" {
		return fmt.Sprintf("%q: %s", commands, w)
	}
	return ""
}

// clone crashes a clone: there is no image until there is all of it.
func (j *judge) clone(run *cloneRun) {
	j.t.Helper()
	all := &judge{t: j.t, y: j.y, rng: j.rng, plan: j.plan, level: j.level, log: run.log, timeline: &timeline{ops: []crashOp{run.op}}}
	running := []*crashOp{&run.op}
	for c := range run.log.crashes(j.rng, all.moments(all.timeline)) {
		header := make([]byte, format.SectorSize)
		c.file.content.readAt(header, 0)
		if isZero(header) && c.calls < len(run.log.calls) {
			j.y.crash(c, running, j.level, nil)
		} else {
			all.judge(c, []crashState{run.want}, running)
		}
	}
}

// checkFile runs our check on whatever f holds.
func checkFile(ctx context.Context, f *memFile) (CheckResult, error) {
	return Check(ctx, f, nil)
}

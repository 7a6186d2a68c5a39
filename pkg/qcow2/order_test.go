package qcow2

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file tries orders. One operation is held up at one of its calls of the file, others begin meanwhile and get as far as
// they can, and then it goes on; the call that it was held up at, or a later one, may fail. That is done for each call. Then
// the disk loses any part of what was not synced, at any moment of it. What was promised must be there, each snapshot must
// hold what the disk was at its instant, and nothing may be corrupt.

var (
	orderStep   = flag.Int("order-step", 6, "TestOrder holds an operation at one in so many of its calls")
	orderRandom = flag.Int("order-random", 8, "random orders for TestOrderRandom")
	orderShare  = flag.Int("order-share", 10, "one in so many moments is crashed in TestOrder and TestOrderRandom")
)

// orderFile holds up one call.
type orderFile struct {
	*memFile

	mu      sync.Mutex // guards all below
	calls   int        // so far
	holdAt  int        // the call that is held up
	failAt  int        // the call that fails
	held    chan struct{}
	release chan struct{}
}

// turn is called before each call.
func (f *orderFile) turn(kind callKind) error {
	f.mu.Lock()
	f.calls++
	hold, fails, held, release := f.calls == f.holdAt, f.calls == f.failAt, f.held, f.release
	f.mu.Unlock()
	if hold {
		close(held)
		<-release
	}
	switch {
	case !fails:
		return nil
	case kind == callWrite || kind == callTruncate:
		return fmt.Errorf("%s: %w", kind, ErrNoSpace)
	}
	return fmt.Errorf("%s: %w", kind, syscall.EIO)
}

// plan holds up the hold-th call from now on, and lets the fail-th one fail; 0 is none.
func (f *orderFile) plan(hold, fail int) (held, release chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.holdAt, f.failAt = 0, hold, fail
	f.held, f.release = make(chan struct{}), make(chan struct{})
	return f.held, f.release
}

func (f *orderFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.turn(callRead); err != nil {
		return 0, err
	}
	return f.memFile.ReadAt(p, off)
}

func (f *orderFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.turn(callWrite); err != nil {
		return 0, err
	}
	return f.memFile.WriteAt(p, off)
}

func (f *orderFile) PunchHole(off, n int64) error {
	if err := f.turn(callPunch); err != nil {
		return err
	}
	return f.memFile.PunchHole(off, n)
}

func (f *orderFile) Truncate(size int64) error {
	if err := f.turn(callTruncate); err != nil {
		return err
	}
	return f.memFile.Truncate(size)
}

func (f *orderFile) Sync() error {
	if err := f.turn(callSync); err != nil {
		return err
	}
	return f.memFile.Sync()
}

// event is an operation of an order: when it began and ended, among all events and among the calls of the file.
type event struct {
	what               string
	kind               opKind
	begin, end, cut    int64 // in the order of all; cut is the instant of a snapshot
	beginCall, endCall int
	err                error
	patch              *patch // of a write
	name               string // of a snapshot
	done               chan struct{}
}

// order is a case: what comes before, what is held up, what begins meanwhile, and what comes when all that has ended. See start
// for the words.
type order struct {
	name   string
	base   string // see orderBase
	before []string
	held   string
	during []string
	after  []string
	fails  int // of the calls from the held one on, so many fail, each in a run of its own
}

// orderRun is a run of a case.
type orderRun struct {
	order
	t      *testing.T
	file   *orderFile
	img    *Image
	base   crashState // before
	clock  atomic.Int64
	mu     sync.Mutex // guards events
	events []*event
}

const orderCluster = 512

// orderSize is that of the disks: two L2 tables, of which the second is hardly used.
const orderSize = 70 * orderCluster

// orderBase makes an image with a snapshot "base", without unsynced writes. Of the clusters 0 to 7, the snapshot has the even
// ones only; the disk has them all. More of the image's properties are in its name: "fresh" is an image that was just opened,
// "alone" one without the snapshot, "many blocks" has small refcount blocks.
func (o *orderRun) orderBase(kind string) {
	o.t.Helper()
	f := newMemFile("order")
	bits := 16
	if strings.Contains(kind, "many blocks") {
		bits = 64
	}
	must(o.t, Create(o.t.Context(), f, orderSize, CreateOptions{ClusterSize: orderCluster, RefcountBits: bits}))
	img, err := Open(f, OpenOptions{})
	must(o.t, err)
	img.alloc.batch = 1 // the image that is opened again makes new refcount blocks
	put := func(count int, cluster int64) {
		_, err := img.WriteAt(stamp(count, cluster*orderCluster, orderCluster), cluster*orderCluster)
		must(o.t, err)
	}
	for i := range int64(8) {
		put(1000, i)
	}
	put(1000, 65)
	if !strings.Contains(kind, "alone") {
		_, err = img.CreateSnapshot(o.t.Context(), "base", nil)
		must(o.t, err)
	}
	for i := int64(1); i < 8; i += 2 {
		put(1001, i)
	}
	must(o.t, img.Close())
	o.file = &orderFile{memFile: f.reopen()}
	o.img, err = Open(o.file, OpenOptions{})
	must(o.t, err)
	var seen observation
	must(o.t, seen.observe(o.img))
	o.order.base, o.base = kind, seen.state()
	if strings.Contains(kind, "fresh") {
		must(o.t, o.img.Close())
		f.reopen()
		o.img, err = Open(o.file, OpenOptions{})
		must(o.t, err)
		o.file.record()
		return
	}
	o.file.record()
	// Something is mapped that is not yet committed.
	o.do("write 9")
	o.do("discard 7")
}

// start begins an operation: a word, and what it is about, the first cluster and how many. Besides what guests and operations
// do, there are the parts of a guest's long request: "enter" and "leave", its first and last step, between which "chunk"
// writes, and "commit", which such a request, or one that has begun before, may ask for.
func (o *orderRun) start(what string) *event {
	e := &event{what: what, done: make(chan struct{}), begin: o.clock.Add(1), beginCall: o.file.position()}
	o.mu.Lock()
	count := len(o.events) + 1
	o.events = append(o.events, e)
	o.mu.Unlock()
	verb, place, _ := strings.Cut(what, " ")
	var cluster, n int64 = 0, 1
	_, _ = fmt.Sscan(place, &cluster, &n) // what is missing stays
	off, length := cluster*orderCluster, n*orderCluster
	run := map[string]func() error{
		"write": func() error {
			_, err := o.img.WriteAt(e.patch.data, off)
			return err
		},
		"chunk":   func() error { return o.chunk(off, e.patch.data) },
		"direct":  func() error { return o.direct(e.patch.data, off) },
		"discard": func() error { return o.img.Discard(off, length) },
		"zero":    func() error { return o.img.WriteZeroes(off, length) },
		"flush":   o.img.Flush,
		"commit":  o.img.commit,
		"enter":   func() error { return o.img.begin(0, 0, true) },
		"leave":   func() error { o.img.end(); return nil },
		"create": func() error {
			_, err := o.img.CreateSnapshot(o.t.Context(), e.name, func(Snapshot) { e.cut = o.clock.Add(1) })
			return err
		},
		"delete": func() error { return o.img.DeleteSnapshot(o.t.Context(), ByName("base")) },
		"reclaim": func() error {
			_, err := o.img.ReclaimLeaks(o.t.Context())
			return err
		},
	}[verb]
	switch verb {
	case "write", "direct", "chunk":
		e.kind, e.patch = opWrite, &patch{off, length, stamp(count, off, length)}
	case "discard", "zero":
		e.kind, e.patch = opDiscard, &patch{off, length, nil}
	case "flush":
		e.kind = opFlush
	case "create":
		e.kind, e.name = opCreate, fmt.Sprint("s", count)
	case "delete":
		e.kind, e.name = opDelete, "base"
	}
	go func() {
		defer close(e.done)
		e.err = run()
		e.end, e.endCall = o.clock.Add(1), o.file.position()
	}()
	return e
}

// chunk writes as a part of a request that has begun.
func (o *orderRun) chunk(off int64, p []byte) error {
	return o.img.g.Chunks(format.GuestOffset(off), int64(len(p)), func(c format.Chunk) error { return o.img.writeChunk(c, p[int64(c.Off)-off:][:c.N]) })
}

// direct writes as the event loop does: to the file itself, if it may, and else as others do.
func (o *orderRun) direct(p []byte, off int64) error {
	var d Direct
	host, ok := o.img.StartDirect(&d, off, int64(len(p)), true)
	if !ok {
		_, err := o.img.WriteAt(p, off)
		return err
	}
	defer o.img.EndDirect(&d, true)
	_, err := o.file.WriteAt(p, host)
	return err
}

// do carries out an operation.
func (o *orderRun) do(what string) {
	<-o.start(what).done
	o.img.background.Wait()
}

// settle waits until an operation has ended or cannot go on.
func (e *event) settle() {
	for {
		select {
		case <-e.done:
			return
		default:
		}
		if allBlocked() {
			return
		}
		runtime.Gosched()
	}
}

// settle waits until nothing can go on.
func settle() {
	for !allBlocked() {
		runtime.Gosched()
	}
}

// allBlocked tells whether each goroutine that is at an image waits for something.
func allBlocked() bool {
	buffer := make([]byte, 256<<10)
	stacks := bytes.Split(buffer[:runtime.Stack(buffer, true)], []byte("\n\n"))
	for _, s := range stacks[1:] { // the first is the caller's
		head, frames, _ := bytes.Cut(s, []byte("\n"))
		if !bytes.Contains(frames, []byte("pkg/qcow2.")) {
			continue
		}
		for _, state := range []string{"[running", "[runnable", "[syscall", "[sleep", "[GC", "[preempted"} {
			if bytes.Contains(head, []byte(state)) {
				return false
			}
		}
	}
	return true
}

// try makes the run in which the hold-th call is held up, and the fail-th one from there on fails. It says whether there
// are so many calls.
func (o order) try(t *testing.T, hold, fail int) bool {
	t.Helper()
	r := &orderRun{order: o, t: t}
	r.orderBase(o.base)
	failAt := 0
	if fail > 0 {
		failAt = hold + fail - 1
	}
	var running []*event
	begin := func(all []string) {
		for _, what := range all {
			e := r.start(what)
			e.settle()
			running = append(running, e)
		}
	}
	begin(o.before)
	held, release := r.file.plan(hold, failAt)
	first := r.start(o.held)
	settle() // it may wait for what was before, or let that go on
	begin(o.during)
	settle()
	reached := false
	select {
	case <-held:
		reached = true
	default:
	}
	close(release)
	for _, e := range append(running, first) {
		<-e.done
	}
	r.img.background.Wait()
	r.file.plan(0, 0)
	for _, what := range o.after {
		r.do(what)
	}
	r.judge(hold, fail)
	return reached
}

// history tells what happened.
func (o *orderRun) history() string {
	var b strings.Builder
	for _, e := range o.events {
		fmt.Fprintf(&b, "%s: events %d to %d, cut %d, calls %d to %d: %v\n", e.what, e.begin, e.end, e.cut, e.beginCall, e.endCall, e.err)
	}
	return b.String()
}

// judge looks at the image as it is, and after each crash.
func (o *orderRun) judge(hold, fail int) {
	o.t.Helper()
	log := o.file.log
	if o.img.failed() == nil {
		o.mustHold("as it is", o.img, len(log.calls), false)
		must(o.t, o.img.Close())
		if r, err := checkFile(o.t.Context(), o.file.clone()); err != nil || r.ExitStatus() != 0 {
			o.fail("closed", "%+v, %v", r, err)
		}
	}
	rng := rand.New(rand.NewPCG(uint64(hold), uint64(fail)))
	number := 0
	moments := func(n int) int {
		switch {
		case n == len(log.calls) || log.calls[n].kind == callSync: // as much as ever may be lost
			return 10
		case rng.IntN(*orderShare) > 0:
			return -1
		}
		return 4
	}
	for c := range log.crashes(rng, moments) {
		number++
		what := fmt.Sprintf("held at %d, failed at %d, crash after %d of %d calls (%s)", hold, fail, c.calls, len(log.calls), c.kind)
		if r, err := checkFile(o.t.Context(), c.file); err != nil || r.Corruptions != 0 {
			o.fail(what, "%+v, %v", r, err)
		}
		img, err := Open(c.file.clone(), OpenOptions{})
		if err != nil {
			o.fail(what, "%v", err)
		}
		o.mustHold(what, img, c.calls, true)
		if number%20 == 0 {
			o.goOn(what, img)
		}
	}
}

func (o *orderRun) fail(what, text string, args ...any) {
	o.t.Helper()
	o.t.Fatalf("%s: %s\n%s", what, fmt.Sprintf(text, args...), o.history())
}

// goOn writes all over the disk: no snapshot may change.
func (o *orderRun) goOn(what string, img *Image) {
	o.t.Helper()
	var before, after observation
	must(o.t, before.observe(img))
	_, err := img.WriteAt(stamp(2000, 0, orderSize), 0)
	must(o.t, err)
	must(o.t, img.Flush())
	must(o.t, after.observe(img))
	for i, s := range before.snaps {
		if !bytes.Equal(s.content, after.snaps[i].content) {
			o.fail(what, "a write to the disk changes snapshot %s", s.name)
		}
	}
	must(o.t, img.Close())
	if r, err := checkFile(o.t.Context(), img.f.File.(*memFile).reopen()); err != nil || r.Corruptions != 0 {
		o.fail(what, "and then writes: %+v, %v", r, err)
	}
}

// mustHold compares an image with what it may be after so many calls, and a crash then.
func (o *orderRun) mustHold(what string, img *Image, calls int, crashed bool) {
	o.t.Helper()
	var got observation
	if err := got.observe(img); err != nil {
		o.fail(what, "%v", err)
	}
	settled := func(w *event) bool {
		return slices.ContainsFunc(o.events, func(f *event) bool {
			return f.kind == opFlush && f.err == nil && w.end < f.begin && f.endCall <= calls
		})
	}
	if !crashed {
		settled = func(*event) bool { return true }
	}
	if at := o.wrong(got.active, func(w *event) bool { return w.beginCall <= calls }, settled); at >= 0 {
		o.fail(what, "the disk is wrong at %#x", at)
	}
	for _, s := range got.snaps {
		if w := o.snapshotWrong(s, calls); w != "" {
			o.fail(what, "snapshot %s %s", s.name, w)
		}
	}
	for _, e := range o.events {
		listed := slices.ContainsFunc(got.snaps, func(s observedSnapshot) bool { return s.name == e.name })
		switch over := e.err == nil && e.endCall <= calls; {
		case e.kind == opCreate && over && !listed:
			o.fail(what, "snapshot %s is missing", e.name)
		case e.kind == opDelete && over && listed:
			o.fail(what, "snapshot %s is there again", e.name)
		}
	}
}

// snapshotWrong says what is wrong with a snapshot that is listed, if anything is.
func (o *orderRun) snapshotWrong(s observedSnapshot, calls int) string {
	if s.name == "base" {
		if i := o.base.snaps[0].content.differs(s.content, 0); i >= 0 {
			return fmt.Sprintf("is wrong at %#x", i)
		}
		return ""
	}
	i := slices.IndexFunc(o.events, func(e *event) bool { return e.kind == opCreate && e.name == s.name })
	switch e := o.events[i]; {
	case e.err != nil && !errors.Is(e.err, ErrFailed):
		return "is listed, though its creation failed"
	case e.beginCall > calls:
		return "is listed before it was created"
	default:
		before := func(w *event) bool { return w.end < e.cut }
		if at := o.wrong(s.content, func(w *event) bool { return w.begin < e.cut }, before); at >= 0 {
			return fmt.Sprintf("is wrong at %#x", at)
		}
	}
	return ""
}

// wrong returns the first sector that holds nothing that it may hold, or -1. It may hold what a write that had begun wrote, or
// what it had at first, unless a settled write has come since.
func (o *orderRun) wrong(content []byte, begun, settled func(*event) bool) int64 {
	covers := func(w *event, at int64) bool {
		return w.patch != nil && at >= w.patch.off && at < w.patch.off+w.patch.n
	}
	for at := int64(0); at < int64(len(content)); at += format.SectorSize {
		since := func(end int64) bool {
			return slices.ContainsFunc(o.events, func(w *event) bool { return covers(w, at) && w.err == nil && settled(w) && end < w.begin })
		}
		sector := content[at : at+format.SectorSize]
		ok := !since(0) && o.base.durable.differs(sector, at) < 0
		for _, w := range o.events {
			if !ok && covers(w, at) && begun(w) && !since(w.end) {
				ok = w.patch.data == nil && isZero(sector) ||
					w.patch.data != nil && bytes.Equal(sector, w.patch.data[at-w.patch.off:at-w.patch.off+format.SectorSize])
			}
		}
		if !ok {
			return at
		}
	}
	return -1
}

// orders are those that have an operation for each thing that the order of writes is to keep.
func orders() []order {
	return []order{
		{name: "a reservation that makes refcount blocks", base: "fresh, alone, many blocks", held: "write 10 50", after: []string{"flush"}},
		{
			name: "a snapshot's instant amid a commit", base: "dirty", before: []string{"enter", "create", "chunk 10"}, held: "commit",
			during: []string{"leave", "write 12"}, after: []string{"flush"}, fails: 2,
		},
		{
			name: "a snapshot's instant before a commit", base: "dirty", before: []string{"enter", "create", "chunk 10"}, held: "commit",
			during: []string{"chunk 11", "commit", "leave", "write 12"}, after: []string{"flush"}, fails: 8,
		},
		{
			name: "a snapshot's instant amid the commit of another table", base: "dirty", before: []string{"enter", "create", "chunk 65"}, held: "commit",
			during: []string{"chunk 11", "leave", "write 12"}, after: []string{"flush"},
		},
		{
			name: "a snapshot fails with what it has frozen", base: "dirty", before: []string{"enter", "create", "chunk 11"},
			held: "leave", after: []string{"write 12", "flush"}, fails: 1,
		},
		{name: "a snapshot amid a flush", base: "dirty", held: "flush", during: []string{"write 11", "create", "write 12"}, after: []string{"flush"}, fails: 4},
		{name: "a snapshot fails", base: "dirty", held: "create", after: []string{"write 12", "discard 9", "flush"}, fails: 1},
		{name: "writes beside a creation", base: "dirty", held: "create", during: []string{"write 0 2", "direct 3", "flush"}, after: []string{"flush"}},
		{name: "new tables beside a creation", base: "dirty", held: "create", during: []string{"write 64 3"}, after: []string{"flush"}},
		{name: "writes beside a deletion", base: "fresh", held: "delete", during: []string{"write 20 6", "flush"}, after: []string{"flush"}},
		{name: "writes beside a search for leaks", base: "fresh", held: "reclaim", during: []string{"write 20 6", "write 65", "discard 3", "flush"}, after: []string{"flush"}},
		{name: "operations beside a search for leaks", base: "dirty", held: "reclaim", during: []string{"create", "write 1 2", "delete", "flush"}, after: []string{"flush"}},
		{name: "a write beside a creation that fails", base: "dirty", held: "create", during: []string{"write 1"}, after: []string{"flush"}, fails: 1},
	}
}

// maxHeld bounds the calls at which an operation is held up.
const maxHeld = 200

func TestOrder(t *testing.T) {
	for _, o := range orders() {
		t.Run(o.name, func(t *testing.T) {
			runs := 0
			for fail := range o.fails + 1 {
				for hold := 1; hold < maxHeld; hold += *orderStep {
					runs++
					if !o.try(t, hold, fail) {
						break
					}
				}
			}
			t.Logf("%d runs", runs)
		})
	}
}

// TestOrderRandom tries random orders of random operations.
func TestOrderRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 7))
	ops := []string{"write 0 2", "write 1", "write 12", "write 20 6", "write 64 3", "direct 3", "direct 5 2", "discard 4 2", "zero 5", "flush", "flush", "create", "delete"}
	pick := func(most int) (all []string) {
		for range rng.IntN(most + 1) {
			all = append(all, ops[rng.IntN(len(ops))])
		}
		return all
	}
	for range *orderRandom {
		o := order{
			base: []string{"dirty", "fresh", "fresh, many blocks", "dirty, many blocks"}[rng.IntN(4)],
			held: ops[rng.IntN(len(ops))], during: pick(4), after: append(pick(2), "flush"),
		}
		o.name = fmt.Sprintf("%s: %s held, %q, %q", o.base, o.held, o.during, o.after)
		t.Run(o.name, func(t *testing.T) { o.try(t, 1+rng.IntN(30), rng.IntN(6)) })
	}
}

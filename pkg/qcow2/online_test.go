package qcow2

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file takes and deletes snapshots while a guest works (C5), and crashes the image at every moment of it: with the
// guest's requests put between the file calls of the snapshot operation one by one, and with a guest of its own goroutine.

var onlineHistories = flag.Int("online-histories", 8, "random histories for TestCrashOnline")

// besideConfigs are the images of the histories of a batch of TestCrash that have guests beside the operations on
// snapshots: some in turn, and always those with subclusters, which are dear to leave to chance.
func besideConfigs(seed uint64) []crashParams {
	var extended, others []crashParams
	for _, p := range crashConfigs() {
		switch {
		case p.ExtendedL2:
			extended = append(extended, p)
		case !p.fullTable:
			others = append(others, p)
		}
	}
	for i := range uint64(4) {
		extended = append(extended, others[(seed+i)%uint64(len(others))])
	}
	return extended
}

// besideHistory has operations on snapshots, and a guest that makes its requests between their calls of the file.
type besideHistory struct {
	*crashHistory
	at      int  // between which calls of an operation it makes some in any case
	calls   int  // of the running operation so far
	running bool // the guest
}

func crashBeside(t *testing.T, y *crashTally, seed uint64, p crashParams, plan crashPlan) {
	t.Helper()
	h := &besideHistory{crashHistory: newCrashHistory(t, seed, p), at: int(seed)}
	for range 3 {
		h.create()
		h.dress(h.rng.Int64N(2))
		h.delete()
		h.dress(h.rng.Int64N(2))
		h.at++
	}
	h.end()
	h.crash(t, y, plan)
}

// beside makes an operation on snapshots with a guest beside it. change lists the snapshots that there are afterwards.
func (h *besideHistory) beside(kind opKind, what string, change func([]modelSnapshot) []modelSnapshot, f func() error) {
	h.t.Helper()
	before := *h.img.hdr.Load()
	op := besideOp{crashOp: crashOp{kind: kind, what: what, begin: h.file.position(), touches: h.kinds(0, h.img.Size())}}
	h.calls = 0
	h.file.between = h.between
	err := f()
	h.file.between = nil
	op.end = h.file.position()
	op.snaps = h.state.snaps
	switch {
	case err == nil:
		op.snaps = change(slices.Clone(h.state.snaps))
	case !h.tooNarrow(err):
		h.t.Fatalf("%s: %v", what, err)
	}
	op.grown(before, h.img)
	h.timeline.beside = append(h.timeline.beside, op)
	h.state.snaps = op.snaps
}

// between lets the guest work where it would not have to wait.
func (h *besideHistory) between() {
	if h.running || !h.img.idle() {
		return
	}
	h.running = true
	defer func() { h.running = false }()
	h.calls++
	if h.calls != h.at%16 && h.rng.IntN(6) > 0 {
		return
	}
	for range 1 + h.rng.IntN(2) {
		h.guest()
	}
	if h.rng.IntN(2) == 0 {
		h.flush()
	}
}

// idle tells whether a guest's request would not have to wait for an operation on snapshots, nor for a table that a search reads.
func (img *Image) idle() bool {
	if !img.gate.TryRLock() {
		return false
	}
	defer img.gate.RUnlock()
	for _, mu := range []interface {
		TryLock() bool
		Unlock()
	}{&img.commitMu, &img.tableMu, &img.alloc.ledger, &img.alloc.mu, &img.mu, &img.hdrMu} {
		if !mu.TryLock() {
			return false
		}
		mu.Unlock()
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	return len(img.loading) == 0 && !img.f.Syncing()
}

func (h *besideHistory) create() {
	h.t.Helper()
	h.count++
	name := fmt.Sprintf("b%d", h.count)
	var content *sparse
	h.beside(opCreateBeside, "create "+name, func(snaps []modelSnapshot) []modelSnapshot {
		return append(snaps, modelSnapshot{name: name, content: content})
	}, func() error {
		_, err := h.img.CreateSnapshot(h.t.Context(), name, func(Snapshot) { content = h.state.settled().durable })
		return err
	})
}

func (h *besideHistory) delete() {
	h.t.Helper()
	if len(h.state.snaps) == 0 {
		return
	}
	i := h.rng.IntN(len(h.state.snaps))
	name := h.state.snaps[i].name
	h.beside(opDeleteBeside, "delete "+name, func(snaps []modelSnapshot) []modelSnapshot { return slices.Delete(snaps, i, i+1) },
		func() error { return h.img.DeleteSnapshot(h.t.Context(), ByName(name)) })
}

// reclaim gives back leaks of an earlier crash beside the guest.
func (h *besideHistory) reclaim() {
	h.t.Helper()
	h.beside(opReclaim, "reclaim leaks", func(snaps []modelSnapshot) []modelSnapshot { return snaps }, func() error {
		_, err := h.img.ReclaimLeaks(h.t.Context())
		return err
	})
}

// onlineHistory has operations on snapshots in a goroutine of their own.
type onlineHistory struct {
	*crashHistory
	done   chan struct{} // closed when the operations have ended, which makes the following final
	listed []modelSnapshot
	ops    []besideOp
	cuts   []cut
	err    error
}

// cut is the content of a new snapshot, which the disk had at some instant while the operation ran.
type cut struct {
	what, name string
	begin, end int
	content    *sparse
}

// maxGuestRequests bounds a history: the crashes of a longer one take too long to judge.
const maxGuestRequests = 300

func TestCrashOnline(t *testing.T) {
	y := newCrashTally()
	plan := crashPlan{share: 12, versions: 1, check: 80, goOn: 15, second: 8, qemu: 200}
	t.Run("histories", func(t *testing.T) {
		for seed := range uint64(*onlineHistories) {
			t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
				t.Parallel()
				crashOnline(t, y, seed, plan)
			})
		}
	})
	y.report(t)
}

func crashOnline(t *testing.T, y *crashTally, seed uint64, plan crashPlan) {
	t.Helper()
	p := crashParams{}
	p.ClusterSize, p.Version, p.RefcountBits = []int64{512, 512, 1024, 4096}[seed%4], 3, 16
	p.size = min(24*p.geometry().L2Coverage, 512<<10)
	o := &onlineHistory{crashHistory: newCrashHistory(t, seed, p), done: make(chan struct{})}
	o.write(0, o.img.Size())
	o.flush()
	o.restart()
	o.listed = o.state.snaps
	o.file.setFault(o.mix(seed%3 == 0))

	go o.work(rand.New(rand.NewPCG(seed, 8)))
	for i := 0; i < maxGuestRequests && (seed%2 == 0 || i < 60) && !o.ended(); i++ {
		if i%5 == 4 {
			o.flush()
		} else {
			o.guest()
		}
	}
	o.close() // which may end an operation early
	<-o.done
	o.file.setFault(nil)
	must(t, o.err)
	o.readLatest()
	o.beside, o.state.snaps = o.ops, o.listed
	o.closed()
	for _, c := range o.cuts {
		if !o.atSomeInstant(c) {
			t.Fatalf("%s: it is not the disk at any instant between its call and its answer\n%s", c.what, o.history())
		}
	}
	o.crash(t, y, plan)
}

func (o *onlineHistory) ended() bool {
	select {
	case <-o.done:
		return true
	default:
		return false
	}
}

// mix is called before each call of the file and lets the other goroutine go on. With full the disk is full once, for a
// guest that meets an operation on snapshots: it is given up and the guest goes on.
func (o *onlineHistory) mix(full bool) func(fileCall) error {
	return func(c fileCall) error {
		runtime.Gosched()
		if full && c.kind == callTruncate && o.img.mu.TryLock() {
			defer o.img.mu.Unlock()
			if o.img.build != nil {
				full = false
				return ErrNoSpace
			}
		}
		return nil
	}
}

// work makes the operations on snapshots.
func (o *onlineHistory) work(rng *rand.Rand) {
	defer close(o.done)
	for i := 0; i < 6 && o.err == nil; i++ {
		if len(o.listed) > 2 || len(o.listed) > 0 && rng.IntN(2) == 0 {
			o.err = o.deleteOne(rng.IntN(len(o.listed)))
		} else {
			o.err = o.createOne(fmt.Sprintf("o%d", i))
		}
		if errors.Is(o.err, ErrClosed) {
			o.err = nil
			return
		}
	}
}

// run makes one of them, after which the snapshots are those of listed; not if it was given up.
func (o *onlineHistory) run(kind opKind, what string, listed []modelSnapshot, f func() error) (bool, error) {
	op := besideOp{crashOp: crashOp{kind: kind, what: what, begin: o.file.position()}}
	err := f()
	op.end = o.file.position()
	if err == nil {
		o.listed = listed
	} else if op.what += ": " + err.Error(); errors.Is(err, ErrNoSpace) {
		err = nil
	}
	op.snaps = o.listed
	o.ops = append(o.ops, op)
	return err == nil && len(o.listed) == len(listed), err
}

func (o *onlineHistory) deleteOne(i int) error {
	name := o.listed[i].name
	_, err := o.run(opDeleteBeside, "delete "+name, slices.Delete(slices.Clone(o.listed), i, i+1), func() error {
		return o.img.DeleteSnapshot(o.t.Context(), ByName(name))
	})
	return err
}

func (o *onlineHistory) createOne(name string) error {
	content := newSparse()
	listed := append(slices.Clone(o.listed), modelSnapshot{name: name, content: content})
	made, err := o.run(opCreateBeside, "create "+name, listed, func() error {
		_, err := o.img.CreateSnapshot(o.t.Context(), name, nil)
		return err
	})
	if err != nil || !made {
		return err
	}
	op := o.ops[len(o.ops)-1]
	o.cuts = append(o.cuts, cut{op.what, name, op.begin, op.end, content})
	return readSnapshot(o.img, name, content)
}

func readSnapshot(img *Image, name string, content *sparse) error {
	v, err := img.OpenSnapshot(ByName(name))
	if err != nil {
		return err
	}
	p := make([]byte, v.Size())
	if _, err := v.ReadAt(p, 0); err != nil {
		return err
	}
	content.writeAt(p, 0)
	return v.Close()
}

// readLatest reads the latest snapshot that was created from the closed image: the guest closed it before that was done.
func (o *onlineHistory) readLatest() {
	o.t.Helper()
	if len(o.cuts) == 0 || o.cuts[len(o.cuts)-1].content.size > 0 {
		return
	}
	c := o.cuts[len(o.cuts)-1]
	img, err := Open(o.file.clone(), OpenOptions{ReadOnly: true})
	must(o.t, err)
	must(o.t, readSnapshot(img, c.name, c.content))
	must(o.t, img.Close())
}

// atSomeInstant tells whether a snapshot is the disk after some number of requests: at least those that had ended when
// it was asked for, at most those that had begun when it was there.
func (o *onlineHistory) atSomeInstant(c cut) bool {
	disk, got, want := o.first.durable.clone(), make([]byte, c.content.size), make([]byte, c.content.size)
	c.content.readAt(want, 0)
	same := func() bool {
		disk.readAt(got, 0)
		return bytes.Equal(got, want)
	}
	for _, op := range o.timeline.ops {
		if op.begin > c.end {
			break
		}
		if op.end >= c.begin && same() {
			return true
		}
		if op.patch != nil {
			op.patch.apply(disk)
		}
	}
	return same()
}

// TestUncommittedAtSwitch: a guest overwrites all that a table maps while an operation runs, and does not flush. What the
// table has on disk then must be right for the new counts too.
func TestUncommittedAtSwitch(t *testing.T) {
	for name, op := range map[string]func(*Image) error{
		"create": func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "two", nil); return err },
		"delete": func(img *Image) error { return img.DeleteSnapshot(t.Context(), ByName("one")) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile("uncommitted")
			must(t, Create(t.Context(), f, 4*format.SectorSize, CreateOptions{ClusterSize: 512}))
			img, err := Open(f, OpenOptions{})
			must(t, err)
			write := func(count int) {
				_, err := img.WriteAt(stamp(count, 0, 4*format.SectorSize), 0)
				must(t, err)
			}
			write(1)
			if name == "delete" {
				_, err := img.CreateSnapshot(t.Context(), "one", nil)
				must(t, err)
			}
			must(t, img.Flush())
			writes := 0
			f.between = func() {
				if writes == 0 && img.build != nil && img.idle() {
					writes++
					write(2)
				}
			}
			must(t, op(img))
			if f.between = nil; writes == 0 {
				t.Fatal("the guest never wrote")
			}
			if r, err := checkFile(t.Context(), f.clone()); err != nil || r.Corruptions != 0 {
				t.Errorf("after a crash: %+v, %v", r, err)
			}
			must(t, img.Close())
		})
	}
}

// TestTableGivenUpEarly: a guest gives up a table that the next generation has replaced, and commits that, before the
// operation has seen it. The reference must not be taken away twice.
func TestTableGivenUpEarly(t *testing.T) {
	gaveUp := 0
	for call := range 8 {
		f := newMemFile("early")
		must(t, Create(t.Context(), f, 4*format.SectorSize, CreateOptions{ClusterSize: 512}))
		img, err := Open(f, OpenOptions{})
		must(t, err)
		write := func(count int) {
			_, err := img.WriteAt(stamp(count, 0, 4*format.SectorSize), 0)
			must(t, err)
			must(t, img.Flush())
		}
		create := func(name string) {
			_, err := img.CreateSnapshot(t.Context(), name, nil)
			must(t, err)
		}
		write(1)
		// The second snapshot shares its table with the active disk, and with the first gone its clusters with nobody else.
		create("one")
		create("two")
		must(t, img.DeleteSnapshot(t.Context(), ByName("one")))
		calls, busy := 0, false
		f.between = func() {
			if busy || img.build == nil || !img.idle() {
				return
			}
			if calls++; calls-1 == call {
				busy = true
				write(2)
				if busy = false; len(img.build.tables) > 0 {
					gaveUp++
				}
			}
		}
		must(t, img.DeleteSnapshot(t.Context(), ByName("two")))
		f.between = nil
		must(t, img.Close())
		if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
			t.Errorf("call %d: %+v, %v", call, r, err)
		}
	}
	if gaveUp == 0 {
		t.Error("the guest never came between")
	}
}

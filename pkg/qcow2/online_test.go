package qcow2

import (
	"bytes"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// This file takes and deletes snapshots while a guest works (C5), and crashes the image at every moment of it.

var onlineHistories = flag.Int("online-histories", 8, "random histories for TestCrashOnline")

// onlineOp is an operation on snapshots that guests did not wait for.
type onlineOp struct {
	what       string
	begin, end int
	change     func([]modelSnapshot) []modelSnapshot
}

// onlineHistory has one goroutine of guest operations, in crashHistory, and one that works on snapshots.
type onlineHistory struct {
	*crashHistory
	mu     sync.Mutex // guards the guest's ops and ended
	ended  int        // how many of the guest's ops have ended; one more may be running
	snaps  []onlineOp
	listed []modelSnapshot
}

// newOnlineHistory starts with a mapped disk of many L2 tables and one snapshot.
func newOnlineHistory(t *testing.T, seed uint64) *onlineHistory {
	rng := rand.New(rand.NewPCG(seed, 7))
	clusterSize := int64([]int{512, 512, 1024, 4096}[rng.IntN(4)])
	h := &crashHistory{t: t, rng: rng, file: newMemFile(fmt.Sprintf("online-%d", seed))}
	h.g = newGeometry(uint(9+log2(clusterSize/512)), 4, false)
	size := min(24*h.g.l2Coverage, 1<<20)
	must(t, Create(h.file, size, CreateOptions{ClusterSize: clusterSize}))
	h.state.durable = newSparse()
	h.state.durable.size = size
	img, err := Open(h.file.reopen(), OpenOptions{L2CacheSize: 8 * clusterSize})
	must(t, err)
	h.img = img
	h.log = h.file.record()
	p := stamp(1<<20, 0, size)
	h.do(crashOp{what: "fill", patch: &patch{0, size, p}}, func() error {
		_, err := img.WriteAt(p, 0)
		return err
	})
	for range 8 {
		h.guest()
	}
	h.do(crashOp{what: "flush"}, h.img.Flush)
	o := &onlineHistory{crashHistory: h}
	o.create("first")
	h.first, h.ops, h.log = h.state, nil, h.file.record()
	h.first.snaps, o.snaps = o.listed, nil
	return o
}

// create takes a snapshot and finds out which of the contents that it may have it has.
func (o *onlineHistory) create(name string) {
	o.t.Helper()
	op := onlineOp{what: "snapshot " + name, begin: o.file.position()}
	before := o.guestState()
	_, err := o.img.CreateSnapshot(name, nil)
	must(o.t, err)
	op.end = o.file.position()
	after := o.guestState()

	v, err := o.img.OpenSnapshot(ByName(name))
	must(o.t, err)
	got := make([]byte, v.Size())
	_, err = v.ReadAt(got, 0)
	must(o.t, err)
	must(o.t, v.Close())
	content := newSparse()
	content.writeAt(got, 0)
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.atSomeInstant(got, before, after) {
		o.t.Errorf("snapshot %q is not the disk at any instant between its call and its answer", name)
	}
	o.listed = append(slices.Clone(o.listed), modelSnapshot{name: name, content: content})
	listed := o.listed
	op.change = func([]modelSnapshot) []modelSnapshot { return listed }
	o.snaps = append(o.snaps, op)
}

func (o *onlineHistory) delete(i int) {
	o.t.Helper()
	op := onlineOp{what: "delete " + o.listed[i].name, begin: o.file.position()}
	must(o.t, o.img.DeleteSnapshot(ByName(o.listed[i].name)))
	op.end = o.file.position()
	o.listed = slices.Delete(slices.Clone(o.listed), i, i+1)
	listed := o.listed
	op.change = func([]modelSnapshot) []modelSnapshot { return listed }
	o.snaps = append(o.snaps, op)
}

// guestState returns how many operations the guest has ended.
func (o *onlineHistory) guestState() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// atSomeInstant tells whether got is the disk after some number of operations, from before to after or one more.
func (o *onlineHistory) atSomeInstant(got []byte, before, after int) bool {
	s := o.first
	if s.durable == nil {
		s = o.state // the very first snapshot: no guest is running
	}
	want := make([]byte, len(got))
	disk := s.durable.clone()
	for n := 0; ; n++ {
		if n >= before {
			disk.readAt(want, 0)
			if bytes.Equal(got, want) {
				return true
			}
		}
		if n == len(o.ops) || n > after {
			return false
		}
		if p := o.ops[n].patch; p != nil {
			p.apply(disk)
		}
	}
}

// maxGuestOps bounds a history: the crashes of a longer one take too long to judge.
const maxGuestOps = 400

// work is the guest: it goes on until stop is closed.
func (o *onlineHistory) work(stop <-chan struct{}) {
	for i := range maxGuestOps {
		select {
		case <-stop:
			return
		default:
		}
		if i%5 == 4 {
			o.run(crashOp{what: "flush"}, o.img.Flush)
		} else {
			o.request()
		}
	}
}

// request makes a guest's request of crashHistory's kind.
func (o *onlineHistory) request() {
	size := o.first.durable.size
	off := o.rng.Int64N(size/sectorSize) * sectorSize
	n := min(size-off, (1+o.rng.Int64N(2*o.g.clusterSize/sectorSize))*sectorSize)
	o.count++
	switch o.rng.IntN(6) {
	default:
		p := stamp(o.count, off, n)
		o.run(crashOp{what: fmt.Sprintf("%d: write %#x %#x", o.count, off, n), patch: &patch{off, n, p}}, func() error {
			_, err := o.img.WriteAt(p, off)
			return err
		})
	case 0:
		o.run(crashOp{what: fmt.Sprintf("%d: zero %#x %#x", o.count, off, n), patch: &patch{off, n, nil}}, func() error {
			return o.img.WriteZeroes(off, n)
		})
	case 1:
		o.run(crashOp{what: fmt.Sprintf("%d: discard %#x %#x", o.count, off, n), patch: &patch{off, n, nil}}, func() error {
			return o.img.Discard(off, n)
		})
	}
}

// run notes a guest's operation, makes it, and notes its end.
func (o *onlineHistory) run(op crashOp, f func() error) {
	op.begin, op.end = o.file.position(), math.MaxInt
	o.mu.Lock()
	o.ops = append(o.ops, op)
	o.mu.Unlock()
	if err := f(); err != nil {
		o.t.Errorf("%s: %v", op.what, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ops[len(o.ops)-1].end = o.file.position()
	o.ended++
}

// states returns what the image may be after the first n calls.
func (o *onlineHistory) states(n int) []crashState {
	guest := crashState{durable: o.first.durable}
	var guests []crashState
	for i := range o.ops {
		if op := &o.ops[i]; op.end <= n {
			guest = op.apply(guest)
			continue
		} else if op.begin < n {
			guests = append(guests, op.apply(guest))
		}
		break
	}
	guests = append(guests, guest)
	lists := [][]modelSnapshot{o.first.snaps}
	for _, op := range o.snaps {
		switch {
		case op.end <= n:
			lists = [][]modelSnapshot{op.change(nil)}
		case op.begin < n:
			lists = append(lists, op.change(nil))
		}
	}
	var all []crashState
	for _, s := range guests {
		for _, l := range lists {
			s.snaps = l
			all = append(all, s)
		}
	}
	return all
}

func TestCrashOnline(t *testing.T) {
	for seed := range uint64(*onlineHistories) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			o := newOnlineHistory(t, seed)
			o.file.setFault(func(fileCall) error { // not a fault: it mixes the two
				runtime.Gosched()
				return nil
			})
			stop := make(chan struct{})
			var guest sync.WaitGroup
			guest.Go(func() { o.work(stop) })
			rng := rand.New(rand.NewPCG(seed, 8))
			for i := range 6 {
				if len(o.listed) > 2 || len(o.listed) > 0 && rng.IntN(2) == 0 {
					o.delete(rng.IntN(len(o.listed)))
				} else {
					o.create(fmt.Sprintf("s%d", i))
				}
			}
			close(stop)
			guest.Wait()
			must(t, o.img.Close())
			o.file.setFault(nil)
			o.crash(t)
		})
	}
}

func (o *onlineHistory) history() string {
	var b strings.Builder
	for _, op := range o.snaps {
		fmt.Fprintf(&b, "%d-%d %s\n", op.begin, op.end, op.what)
	}
	return b.String()
}

// crash tries a share of the crashes.
func (o *onlineHistory) crash(t *testing.T) {
	tried := 0
	rng := rand.New(rand.NewPCG(uint64(len(o.log.calls)), 9))
	share := max(1, len(o.log.calls)/60)
	for c := range o.log.crashes(rng, func(n int, _ bool) int {
		if rng.IntN(share) > 0 {
			return -1
		}
		return 1
	}) {
		tried++
		forQEMU := c.file.clone()
		fail := func(format string, args ...any) {
			t.Helper()
			path := tempImage(t)
			forQEMU.save(t, path)
			t.Fatalf("crash after %d of %d calls (torn: %t; last: %s): %s\nqemu-img check: %s\n%s", c.calls, len(o.log.calls), c.torn,
				o.log.calls[max(0, c.calls-1)], fmt.Sprintf(format, args...), runQemuCheck(t, path).output, o.history())
		}
		if r, err := checkFile(t.Context(), c.file); err != nil || r.Corruptions != 0 {
			fail("our check: %+v, %v", r, err)
		}
		if rng.IntN(50) == 0 {
			path := tempImage(t)
			forQEMU.save(t, path)
			if r := runQemuCheck(t, path); r.exit != 0 && r.exit != 3 {
				fail("QEMU finds errors")
			}
		}
		goOn := c.file.clone()
		img, err := Open(c.file, OpenOptions{})
		if err != nil {
			fail("%v", err)
		}
		var wrong []string
		allowed := o.states(c.calls)
		for _, s := range allowed {
			if w := s.compare(img); w != "" {
				wrong = append(wrong, w)
			}
		}
		if len(wrong) == len(allowed) {
			fail("the content is none of those allowed: %q", wrong)
		}
		must(t, img.Close())
		if rng.IntN(20) == 0 {
			o.goOn(t, goOn, c)
		}
	}
	t.Logf("%d guest and %d snapshot operations, %d calls, %d states", len(o.ops), len(o.snaps), len(o.log.calls), tried)
}

package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file lets each call of the file fail once during each operation. The error must surface and say where, and what is
// on disk then, with or without a Close, must be the state before or after the operation.

// fault is a way to fail.
type fault struct {
	name  string
	err   error
	short bool // half is done before
	match func(callKind) bool
}

func faults() []fault {
	all := func(callKind) bool { return true }
	grows := func(k callKind) bool { return k == callWrite || k == callTruncate }
	return []fault{
		{"EIO", syscall.EIO, false, all},
		{"ENOSPC", ErrNoSpace, false, grows},
		{"short, then EIO", syscall.EIO, true, func(k callKind) bool { return k == callRead || k == callWrite }},
		{"short, then ENOSPC", ErrNoSpace, true, func(k callKind) bool { return k == callWrite }},
	}
}

// faultBase is an image to start from, closed, and what it holds.
type faultBase struct {
	name  string
	file  *memFile
	g     format.Geometry
	state crashState
	kinds []touched // of the active disk's clusters
	leaks bool      // a crash has left some
}

func newFaultBase(t testing.TB, name string, p crashParams) faultBase {
	t.Helper()
	h := newCrashHistory(t, 1, p)
	kinds := h.survey()
	h.end()
	h.file.log = nil
	h.file.name = faultFile
	return faultBase{name: name, file: h.file.reopen(), g: h.g, state: h.state, kinds: kinds}
}

// faultFile is a name that an error must mention, and no structure's name does.
const faultFile = "the-image-that-fails"

func faultBases(t testing.TB) []faultBase {
	t.Helper()
	configs := crashConfigs()
	return []faultBase{
		newFaultBase(t, "512", configs[0]),
		newFaultBase(t, "extended L2", configs[1]),
		newFaultBase(t, "compressed, 64 bits", configs[2]),
		newFaultBase(t, "version 2", configs[3]),
		newFaultBase(t, "full refcount table", configs[8]),
		newLeakyBase(t, configs[0]),
	}
}

// faultOp is an operation during which calls fail.
type faultOp struct {
	name   string
	patch  *patch // a guest write
	flush  bool   // and a flush after it
	change func(*crashState)
	closes bool
	ahead  bool // clusters are reserved ahead of need meanwhile: an error there is nobody's
	run    func(t *testing.T, img *Image) error
}

// faultGuestOps are a guest's requests to each kind of cluster that the image has.
func faultGuestOps(b faultBase) []faultOp {
	var ops []faultOp
	c := b.g.ClusterSize
	for k := range touchKinds {
		i := slices.Index(b.kinds, touched(1<<k))
		if i < 0 {
			continue
		}
		off, kind := int64(i)<<b.g.ClusterBits, touched(1<<k).String()
		n := min(c, b.state.durable.size-off)
		write := func(what string, off, n int64) {
			p := stamp(99, off, n)
			ops = append(ops, faultOp{name: what + kind, patch: &patch{off, n, p}, run: func(_ *testing.T, img *Image) error {
				_, err := img.WriteAt(p, off)
				return err
			}})
		}
		write("write/", off, n)
		if n > format.SectorSize {
			write("write a part/", off+format.SectorSize, format.SectorSize)
		}
		zeroed := func(what string, run func(img *Image) error) {
			ops = append(ops, faultOp{name: what + kind, patch: &patch{off, n, nil}, flush: true, run: func(_ *testing.T, img *Image) error {
				if err := run(img); err != nil {
					return err
				}
				return img.Flush()
			}})
		}
		zeroed("zero/", func(img *Image) error { return img.WriteZeroes(off, n) })
		zeroed("discard/", func(img *Image) error { return img.Discard(off, n) })
		ops = append(ops, faultOp{name: "read/" + kind, run: func(_ *testing.T, img *Image) error {
			_, err := img.ReadAt(make([]byte, n), off)
			return err
		}})
	}
	return ops
}

// faultWholeOps are the operations that are about the whole image.
func faultWholeOps(b faultBase) []faultOp {
	disk := b.state.durable.size
	large := min(300*format.SectorSize, disk)
	p := stamp(98, disk-large, large)
	ops := []faultOp{
		{name: "write many", patch: &patch{disk - large, large, p}, run: func(_ *testing.T, img *Image) error {
			_, err := img.WriteAt(p, disk-large)
			return err
		}},
		{name: "write many/ahead", ahead: true, patch: &patch{disk - large, large, p}, run: func(_ *testing.T, img *Image) error {
			_, err := img.WriteAt(p, disk-large)
			img.background.Wait()
			return err
		}},
		{name: "flush", run: func(_ *testing.T, img *Image) error { return img.Flush() }},
		{name: "close", closes: true, run: func(_ *testing.T, img *Image) error { return img.Close() }},
		{name: "snapshot create", change: func(s *crashState) {
			s.snaps = append(s.snaps, modelSnapshot{name: "new", content: s.durable.clone()})
		}, run: func(t *testing.T, img *Image) error {
			_, err := img.CreateSnapshot(t.Context(), "new", nil)
			return err
		}},
		{name: "drop the active disk", change: func(s *crashState) {
			size := s.durable.size
			s.durable = newSparse()
			s.durable.size = size
		}, run: func(t *testing.T, img *Image) error { return img.DropActive(t.Context()) }},
		{name: "check", run: func(t *testing.T, img *Image) error {
			_, err := img.Check(t.Context(), nil)
			return err
		}},
		{name: "clone", run: func(t *testing.T, img *Image) error {
			return Clone(t.Context(), newMemFile("clone"), img.Active(), 0, nil)
		}},
	}
	if b.g.Extended || !strings.Contains(b.name, "version 2") {
		ops = append(ops, faultOp{name: "grow", change: func(s *crashState) {
			s.durable = s.durable.clone()
			s.durable.size *= 3
		}, run: func(t *testing.T, img *Image) error { return img.Resize(t.Context(), 3*disk) }})
	}
	if len(b.state.snaps) == 0 {
		return ops
	}
	name := b.state.snaps[0].name
	return append(ops,
		faultOp{name: "snapshot goto", change: func(s *crashState) { s.durable = s.snaps[0].content.clone() }, run: func(t *testing.T, img *Image) error {
			return img.GotoSnapshot(t.Context(), ByName(name))
		}},
		faultOp{name: "snapshot delete", change: func(s *crashState) { s.snaps = slices.Delete(s.snaps, 0, 1) }, run: func(t *testing.T, img *Image) error {
			return img.DeleteSnapshot(t.Context(), ByName(name))
		}},
		faultOp{name: "snapshot read", run: func(_ *testing.T, img *Image) error {
			v, err := img.OpenSnapshot(ByName(name))
			if err != nil {
				return err
			}
			_, err = v.ReadAt(make([]byte, v.Size()), 0)
			return errors.Join(err, v.Close())
		}},
	)
}

// faultCount counts points by operation: calls that were made to fail, of those that the operation makes.
type faultCount struct {
	mu  sync.Mutex // guards all below
	ops []string
	n   map[string][]int // by kind of fault
}

func (c *faultCount) add(op string, kind, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	op, _, _ = strings.Cut(op, "/")
	if c.n[op] == nil {
		c.ops, c.n[op] = append(c.ops, op), make([]int, len(faults()))
	}
	c.n[op][kind] += n
}

func (c *faultCount) report(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%-22s", "calls made to fail in")
	for _, f := range faults() {
		fmt.Fprintf(&b, " %19s", f.name)
	}
	total := 0
	slices.Sort(c.ops)
	for _, op := range c.ops {
		fmt.Fprintf(&b, "\n%-22s", op)
		for _, n := range c.n[op] {
			fmt.Fprintf(&b, " %19d", n)
			total += n
		}
	}
	t.Logf("%s\n%d fault points: every call of each", b.String(), total)
}

func TestFaults(t *testing.T) {
	count := &faultCount{n: map[string][]int{}}
	t.Run("images", func(t *testing.T) {
		for _, base := range faultBases(t) {
			ops := append(faultGuestOps(base), faultWholeOps(base)...)
			if base.leaks {
				ops = []faultOp{{name: "reclaim leaks", run: func(t *testing.T, img *Image) error {
					_, err := img.ReclaimLeaks(t.Context())
					return err
				}}}
			}
			if base.name == "full refcount table" { // states are dear: what makes it grow
				ops = slices.DeleteFunc(ops, func(op faultOp) bool { return op.name != "write many" && op.name != "snapshot create" })
			}
			for _, op := range ops {
				t.Run(base.name+"/"+op.name, func(t *testing.T) {
					t.Parallel()
					for i, f := range faults() {
						n := 0
						for faultOnce(t, base, op, n, f) {
							n++
						}
						count.add(op.name, i, n)
					}
				})
			}
		}
	})
	count.report(t)
}

// failing makes the n-th call that matches fail, and returns a function that tells which one that was, if any.
func (f *memFile) failing(n int, how fault) func() (fileCall, bool) {
	var failed fileCall
	happened := f.failOnce(n, how.match, how.err)
	inject := f.fault
	f.setFault(func(c fileCall) error {
		err := inject(c)
		if err == nil {
			return nil
		}
		failed = c
		if how.short {
			return &shortError{err}
		}
		return err
	})
	return func() (fileCall, bool) { return failed, happened() }
}

// faultOnce makes the n-th call of an operation fail. It returns false if there are not so many.
func faultOnce(t *testing.T, base faultBase, op faultOp, n int, how fault) bool {
	t.Helper()
	f := base.file.clone()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	img.alloc.ahead = !op.ahead // if not, as if a reservation were under way
	log := f.record()
	before := base.state
	for i, off := range []int64{base.state.durable.size / 2 &^ (format.SectorSize - 1), img.g.ClusterSize} { // something unflushed
		p := patch{off, format.SectorSize, stamp(50+i, off, format.SectorSize)}
		_, err := img.WriteAt(p.data, p.off)
		must(t, err)
		before.pending = append(slices.Clone(before.pending), p)
	}
	o := crashOp{patch: op.patch, settle: op.patch == nil, change: op.change}
	after := o.apply(before)
	if op.flush {
		before = after
		after = after.settled()
	}

	failing := f.failing(n, how)
	err = op.run(t, img)
	f.setFault(nil)
	failed, happened := failing()
	if !happened {
		must(t, err)
		if !op.closes {
			must(t, img.Close())
		}
		return false
	}
	what := fmt.Sprintf("call %d, %s, failed (%s): %s: %v", n, failed, how.name, op.name, err)
	allowed := []crashState{before, after}
	switch {
	case err == nil && op.ahead:
	case err == nil && failed.kind == callPunch, // after the switch: costs space only
		err == nil && op.name == "snapshot delete" && errors.Is(how.err, ErrNoSpace): // it does without
		allowed = allowed[1:]
	case err == nil && op.name == "check" && failed.kind == callRead && how.short: // it read ahead, and the half was enough
	case err == nil:
		t.Fatalf("%s: the error is lost", what)
	case !errors.Is(err, how.err):
		t.Fatalf("%s: errors.Is does not find the cause", what)
	case !strings.Contains(err.Error(), faultFile):
		t.Fatalf("%s: the error does not name the file", what)
	}
	rng := rand.New(rand.NewPCG(uint64(n), 7))
	for c := range log.crashes(rng, func(at int) int {
		if at < len(log.calls) {
			return -1
		}
		return 1
	}) {
		acceptable(t, what+", then a crash", c.file, allowed)
	}
	if !op.closes {
		allowed = goesOn(t, what, img, op, before, allowed)
	}
	acceptable(t, what+", then Close", f.clone(), allowed)
	return true
}

// goesOn lets an image work after a fault and closes it. It returns what the image may hold then.
func goesOn(t *testing.T, what string, img *Image, op faultOp, before crashState, allowed []crashState) []crashState {
	t.Helper()
	probe := patch{0, format.SectorSize, stamp(97, 0, format.SectorSize)}
	_, err := img.WriteAt(probe.data, probe.off)
	if err == nil {
		err = img.Flush()
	}
	switch {
	case err == nil:
		allowed = slices.Clone(allowed)
		for i := range allowed {
			allowed[i] = allowed[i].settled()
		}
		if op.patch != nil { // a failed write may have written a part
			part := allowed[0]
			part.pending = append(slices.Clone(before.pending), *op.patch)
			allowed = append(allowed, part)
		}
		for i := range allowed {
			allowed[i].durable = allowed[i].durable.clone()
			probe.apply(allowed[i].durable)
			allowed[i].pending = slices.DeleteFunc(allowed[i].pending, func(p patch) bool { return p.off == 0 && p.n <= format.SectorSize })
		}
	case errors.Is(err, ErrFailed):
		for i := range allowed {
			allowed[i].pending = append(slices.Clone(allowed[i].pending), probe)
		}
		if _, err := img.ReadAt(make([]byte, format.SectorSize), 0); !errors.Is(err, ErrFailed) {
			t.Fatalf("%s: a failed image goes on reading: %v", what, err)
		}
	default:
		t.Fatalf("%s: then a write, to an image that has not failed: %v", what, err)
	}
	if err := img.Close(); err != nil && !errors.Is(err, ErrFailed) {
		t.Fatalf("%s, then Close: %v", what, err)
	}
	return allowed
}

// acceptable demands that an image is clean but for leaks and holds one of the states.
func acceptable(t *testing.T, what string, f *memFile, allowed []crashState) {
	t.Helper()
	if r, err := checkFile(t.Context(), f); err != nil || r.Corruptions != 0 {
		t.Fatalf("%s: our check: %+v, %v", what, r, err)
	}
	img, err := Open(f, OpenOptions{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	var got observation
	must(t, got.observe(img))
	if ok, wrong := matches(&got, allowed); !ok {
		t.Fatalf("%s: the content is none of those allowed: %q", what, wrong)
	}
}

func TestFaultsOfOpen(t *testing.T) {
	for _, base := range faultBases(t) {
		for _, how := range faults() {
			n := 0
			for ; ; n++ {
				f := base.file.clone()
				failing := f.failing(n, how)
				img, err := Open(f, OpenOptions{})
				failed, happened := failing()
				if happened && err == nil && how.short && failed.kind == callRead {
					f.setFault(nil) // it read ahead, and the half was enough
					acceptable(t, fmt.Sprintf("%s: call %d failed (%s)", base.name, n, how.name), f, []crashState{base.state})
					continue
				}
				if !happened {
					must(t, err)
					f.setFault(nil)
					must(t, img.Close())
					break
				}
				if !errors.Is(err, how.err) || !strings.Contains(err.Error(), faultFile) || !f.closed {
					t.Errorf("%s: call %d failed (%s): Open returns %v, the file is closed: %t", base.name, n, how.name, err, f.closed)
				}
			}
			if n == 0 && how.match(callRead) {
				t.Errorf("%s: no call was made to fail", base.name)
			}
		}
	}
}

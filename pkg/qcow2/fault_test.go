package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
)

// This file lets each call of the file fail once during each operation. The error must surface, and what is on disk
// then, with or without a Close, must be the state before or after the operation.

// faultBase is an image to start from, closed, and what it holds.
type faultBase struct {
	file  *memFile
	state crashState
}

// newFaultBase makes an image with two snapshots, whose active disk shares clusters with both and has some of its own. A
// large one has none.
func newFaultBase(t testing.TB, clusterSize, disk, filled int64) faultBase {
	t.Helper()
	f := newMemFile("fault")
	must(t, Create(f, disk, CreateOptions{ClusterSize: clusterSize}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	s := crashState{durable: newSparse()}
	s.durable.size = disk
	count := 0
	fill := func(off, n int64) {
		count++
		p := stamp(count, off, n)
		_, err := img.WriteAt(p, off)
		must(t, err)
		s.durable.writeAt(p, off)
	}
	snapshot := func(name string) {
		_, err := img.CreateSnapshot(name, nil)
		must(t, err)
		s.snaps = append(s.snaps, modelSnapshot{name: name, content: s.durable.clone()})
	}
	fill(0, filled)
	if disk > 1<<20 {
		must(t, img.Close())
		return faultBase{f, s}
	}
	snapshot("one")
	fill(clusterSize, 3*clusterSize)
	snapshot("two")
	fill(0, 2*clusterSize)
	must(t, img.Close())
	return faultBase{f, s}
}

// faultOp is an operation during which calls fail.
type faultOp struct {
	name   string
	patch  *patch // a guest write
	flush  bool   // and a flush after it
	change func(*crashState)
	run    func(img *Image) error
}

func faultOps(b faultBase, clusterSize int64) []faultOp {
	write := func(name string, off, n int64) faultOp {
		p := stamp(99, off, n)
		return faultOp{name: name, patch: &patch{off, n, p}, run: func(img *Image) error {
			_, err := img.WriteAt(p, off)
			return err
		}}
	}
	zeroed := func(name string, off, n int64, run func(img *Image) error) faultOp {
		return faultOp{name: name, patch: &patch{off, n, nil}, flush: true, run: func(img *Image) error {
			if err := run(img); err != nil {
				return err
			}
			return img.Flush()
		}}
	}
	disk := b.state.durable.size
	return []faultOp{
		write("write in place", 0, clusterSize),
		write("write to shared clusters", 2*clusterSize, 2*clusterSize),
		write("write to a part of a shared cluster", 3*clusterSize, sectorSize),
		write("write to new clusters", disk-300*sectorSize, 300*sectorSize),
		zeroed("zero", 0, 4*clusterSize, func(img *Image) error { return img.WriteZeroes(0, 4*clusterSize) }),
		zeroed("discard", 0, 4*clusterSize, func(img *Image) error { return img.Discard(0, 4*clusterSize) }),
		{name: "flush", run: (*Image).Flush},
		{name: "close", run: (*Image).Close},
		{name: "snapshot", change: func(s *crashState) {
			s.snaps = append(s.snaps, modelSnapshot{name: "three", content: s.durable.clone()})
		}, run: func(img *Image) error {
			_, err := img.CreateSnapshot("three", nil)
			return err
		}},
		{name: "goto", change: func(s *crashState) { s.durable = s.snaps[0].content.clone() }, run: func(img *Image) error {
			return img.GotoSnapshot(ByName("one"))
		}},
		{name: "delete", change: func(s *crashState) { s.snaps = slices.Delete(s.snaps, 1, 2) }, run: func(img *Image) error {
			return img.DeleteSnapshot(ByName("two"))
		}},
		{name: "resize", change: func(s *crashState) {
			s.durable = s.durable.clone()
			s.durable.size *= 3
		}, run: func(img *Image) error { return img.Resize(3 * disk) }},
		{name: "drop the active disk", change: func(s *crashState) {
			size := s.durable.size
			s.durable = newSparse()
			s.durable.size = size
		}, run: (*Image).DropActive},
	}
}

func TestFaults(t *testing.T) {
	for _, test := range []struct {
		name                      string
		clusterSize, disk, filled int64
		only                      string
	}{
		{"512", 512, 300 << 10, 8 << 10, ""},
		{"4096", 4096, 300 << 10, 64 << 10, ""},
		// The refcount table of one cluster counts 8 MiB: the write needs a larger one.
		{"full refcount table", 512, 9 << 20, 8<<20 - 200<<10, "write to new clusters"},
	} {
		base := newFaultBase(t, test.clusterSize, test.disk, test.filled)
		for _, op := range faultOps(base, test.clusterSize) {
			if test.only != "" && op.name != test.only {
				continue
			}
			t.Run(test.name+"/"+op.name, func(t *testing.T) {
				t.Parallel()
				calls := 0
				for _, fault := range []error{syscall.EIO, ErrNoSpace} {
					if test.only != "" && !errors.Is(fault, syscall.EIO) {
						continue // it is slow
					}
					for n := 0; faultOnce(t, base, op, n, fault); n++ {
						calls++
					}
				}
				if calls == 0 {
					t.Error("no call was made to fail")
				}
			})
		}
	}
}

// faultOnce makes the n-th call of an operation fail. It returns false if there are not so many.
func faultOnce(t *testing.T, base faultBase, op faultOp, n int, fault error) bool {
	t.Helper()
	f := base.file.clone()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	log := f.record()
	// Something unflushed: a new cluster and one of its own.
	before := base.state
	for i, off := range []int64{base.state.durable.size / 2 &^ (sectorSize - 1), img.g.clusterSize} {
		p := patch{off, sectorSize, stamp(50+i, off, sectorSize)}
		_, err := img.WriteAt(p.data, p.off)
		must(t, err)
		before.pending = append(slices.Clone(before.pending), p)
	}
	o := crashOp{patch: op.patch, change: op.change}
	after := o.apply(before)
	if op.flush {
		before = after
		after = (&crashOp{}).apply(after)
	}

	var failed fileCall
	happened := f.failOnce(n, func(k callKind) bool { return errors.Is(fault, syscall.EIO) || k == callWrite || k == callTruncate }, fault)
	inject := f.fault
	f.setFault(func(c fileCall) error {
		err := inject(c)
		if err != nil {
			failed = c
		}
		return err
	})
	err = op.run(img)
	f.setFault(nil)
	if !happened() {
		must(t, err)
		return false
	}
	what := fmt.Sprintf("call %d, %s, failed with %v: %s: %v", n, failed, fault, op.name, err)

	allowed := []crashState{before, after}
	switch {
	case err == nil && failed.kind == callPunch: // after the switch: costs space only
		allowed = allowed[1:]
	case err == nil:
		t.Fatalf("%s: the error is lost", what)
	case !errors.Is(err, fault):
		t.Fatalf("%s: errors.Is does not find the cause", what)
	}
	rng := rand.New(rand.NewPCG(uint64(n), 7))
	for c := range log.crashes(rng, func(at int, _ bool) int {
		if at < len(log.calls) {
			return -1
		}
		if base.state.durable.size > 1<<20 {
			return 0
		}
		return 1
	}) {
		acceptable(t, what+", then a crash", c.file, allowed)
	}

	// What the image itself says afterwards, if it goes on.
	if op.name != "close" {
		if err := img.Flush(); err == nil {
			for i := range allowed {
				allowed[i] = (&crashOp{}).apply(allowed[i])
			}
			if op.patch != nil { // a failed write may have written a part
				allowed = append(allowed, before, after)
				allowed[len(allowed)-1].durable = allowed[0].durable
			}
		} else if errors.Is(err, ErrFailed) {
			if _, err := img.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrFailed) {
				t.Fatalf("%s: a failed image goes on reading: %v", what, err)
			}
		}
		if err := img.Close(); err != nil && !errors.Is(err, ErrFailed) {
			t.Fatalf("%s, then Close: %v", what, err)
		}
	}
	acceptable(t, what+", then Close", f.clone(), allowed)
	return true
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
	defer img.Close()
	var wrong []string
	for i := range allowed {
		w := allowed[i].compare(img)
		if w == "" {
			return
		}
		wrong = append(wrong, w)
	}
	t.Fatalf("%s: the content is none of those allowed: %q", what, wrong)
}

func TestFaultsOfOpen(t *testing.T) {
	base := newFaultBase(t, 512, 300<<10, 64<<10)
	for n := 0; ; n++ {
		f := base.file.clone()
		happened := f.failOnce(n, func(callKind) bool { return true }, syscall.EIO)
		img, err := Open(f, OpenOptions{})
		if !happened() {
			must(t, err)
			f.setFault(nil)
			must(t, img.Close())
			if n == 0 {
				t.Error("no call was made to fail")
			}
			return
		}
		if !errors.Is(err, syscall.EIO) || !f.closed {
			t.Errorf("call %d failed: Open returns %v, the file is closed: %t", n, err, f.closed)
		}
	}
}

// TestFaultsOfReads fails the calls of a read: nothing else suffers.
func TestFaultsOfReads(t *testing.T) {
	base := newFaultBase(t, 512, 300<<10, 64<<10)
	f := base.file.clone()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	p := make([]byte, 8<<10)
	happened := f.failOnce(0, func(k callKind) bool { return k == callRead }, syscall.EIO)
	if _, err := img.ReadAt(p, 0); !errors.Is(err, syscall.EIO) || !happened() {
		t.Errorf("read: %v", err)
	}
	v, err := img.OpenSnapshot(ByName("one"))
	must(t, err)
	f.failOnce(0, func(k callKind) bool { return k == callRead }, syscall.EIO)
	if _, err := v.ReadAt(p, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of a snapshot: %v", err)
	}
	f.setFault(nil)
	must(t, v.Close())
	if w := base.state.compare(img); w != "" {
		t.Error(w)
	}
	must(t, img.Close())
}

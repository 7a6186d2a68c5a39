package qcow2

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file counts what the crash tests tried: which operation a crash interrupted, which kinds of clusters that
// operation was about. What is never hit fails the test, so that no change of the tests makes them blind.

// opKind is a kind of operation that a crash interrupts.
type opKind uint8

const (
	opOther opKind = iota // open and close
	opWrite
	opZero
	opDiscard
	opFlush
	opCreate
	opGoto
	opDelete
	opRename
	opGrow
	opDropActive
	opClone
	opRepair
	opCreateBeside
	opDeleteBeside
	opReclaim
	opKinds
)

func (k opKind) String() string {
	return [...]string{
		"open and close", "write", "zero", "discard", "flush", "snapshot create", "snapshot goto", "snapshot delete", "snapshot rename",
		"grow", "drop active", "clone", "repair",
		"create beside guest", "delete beside guest", "reclaim leaks",
	}[k]
}

// touched is a set of cluster kinds.
type touched uint16

const (
	touchUnallocated touched = 1 << iota
	touchZero                // no host cluster
	touchZeroOwn
	touchZeroShared
	touchOwn
	touchShared
	touchCompressed
	touchSubclusters       // some hold data, some do not; its own
	touchSubclustersShared // the same, shared with a snapshot
	touchKinds             = iota
)

func (b touched) String() string {
	return [...]string{
		"unalloc", "zero", "zero own", "zero shr", "own", "shared", "compr", "subcl", "subcl shr",
	}[slices.Index([]touched{
		touchUnallocated, touchZero, touchZeroOwn, touchZeroShared, touchOwn, touchShared, touchCompressed,
		touchSubclusters, touchSubclustersShared,
	}, b)]
}

// touch is the kind of a cluster that the active disk maps with e.
func touch(e format.L2Entry) touched {
	own := e.Own()
	choose := func(mine, shared touched) touched {
		if own {
			return mine
		}
		return shared
	}
	switch e.Kind() {
	case format.KindZero:
		return touchZero
	case format.KindZeroAlloc:
		return choose(touchZeroOwn, touchZeroShared)
	case format.KindData:
		return choose(touchOwn, touchShared)
	case format.KindMixed:
		return choose(touchSubclusters, touchSubclustersShared)
	case format.KindCompressed:
		return touchCompressed
	}
	return touchUnallocated
}

// crashRow counts the crashes that interrupted one kind of operation.
type crashRow struct {
	states, subset, torn, second, ours, qemu, check, findings int
	touched                                                   [touchKinds]int
}

// crashTally counts. Its methods are safe for concurrent use.
type crashTally struct {
	mu     sync.Mutex // guards all below
	total  crashRow
	rows   [opKinds]crashRow
	events map[string]int // crashes in images of a kind, or amid some event
}

func newCrashTally() *crashTally { return &crashTally{events: map[string]int{}} }

// add lets count change the rows of the operations and the total.
func (y *crashTally) add(running []*crashOp, count func(*crashRow)) {
	y.mu.Lock()
	defer y.mu.Unlock()
	count(&y.total)
	for _, op := range running {
		count(&y.rows[op.kind])
	}
}

// crash counts a crash.
func (y *crashTally) crash(c crash, running []*crashOp, level int, events []string) {
	y.add(running, func(r *crashRow) {
		r.states++
		switch c.kind {
		case crashSubset:
			r.subset++
		case crashTorn:
			r.torn++
		}
		if level > 1 {
			r.second++
		}
	})
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, op := range running {
		for k := range touchKinds {
			if op.touches>>k&1 != 0 {
				y.rows[op.kind].touched[k]++
			}
		}
	}
	for _, e := range events {
		y.events[e]++
	}
}

func (y *crashTally) states() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.total.states
}

// report prints the tables. Rows of operations that were never interrupted are left out.
func (y *crashTally) report(t *testing.T) {
	t.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	var b strings.Builder
	line := func(name string, r crashRow) {
		fmt.Fprintf(&b, "%-20s %9d %9d %9d %9d %9d %9d %9d %9d\n", name, r.states, r.subset, r.torn, r.second, r.ours, r.qemu, r.check, r.findings)
	}
	fmt.Fprintf(&b, "\n%-20s %9s %9s %9s %9s %9s %9s %9s %9s\n", "crash during", "states", "subset", "torn", "2nd level", "go on", "QEMU on", "QEMU chk", "findings")
	for k := range y.rows {
		if r := y.rows[k]; r.states > 0 {
			line(opKind(k).String(), r)
		}
	}
	line("all", y.total)
	fmt.Fprintf(&b, "(a crash that interrupts a guest and an operation beside it counts in both rows)\n\n%-20s", "of clusters")
	for k := range touchKinds {
		fmt.Fprintf(&b, " %9s", touched(1<<k))
	}
	b.WriteByte('\n')
	for k := range y.rows {
		r := &y.rows[k]
		if r.states == 0 {
			continue
		}
		fmt.Fprintf(&b, "%-20s", opKind(k))
		for _, n := range r.touched {
			fmt.Fprintf(&b, " %9d", n)
		}
		b.WriteByte('\n')
	}
	b.WriteByte('\n')
	for _, e := range allEvents() {
		fmt.Fprintf(&b, "%-32s %9d\n", e, y.events[e])
	}
	t.Log(b.String())
}

// complete fails the test for whatever was never hit, but for the operations left out.
func (y *crashTally) complete(t *testing.T, leftOut ...opKind) {
	t.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	for k := range opKinds {
		if slices.Contains(leftOut, k) {
			continue
		}
		for i, n := range y.rows[k].touched {
			if n == 0 {
				t.Errorf("no crash interrupted %s of clusters of kind %q", k, touched(1<<i))
			}
		}
	}
	for _, e := range allEvents() {
		if y.events[e] == 0 {
			t.Errorf("no crash was tried: %s", e)
		}
	}
}

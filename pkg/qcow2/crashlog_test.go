package qcow2

import (
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file rebuilds what a file may hold after a crash: the machine keeps what was synced, and any part of what was
// not, sector by sector.

// crashLog holds what happened to a file: its content when the log began, and each change since then.
type crashLog struct {
	name  string
	base  *sparse
	calls []fileCall
}

// crash is what a file may hold after a crash.
type crash struct {
	calls int // how many calls had been made
	kind  crashKind
	file  *memFile
}

// crashKind says what became of the calls that were not synced.
type crashKind uint8

const (
	crashWhole  crashKind = iota // all were made: the process died, or the disk writes in order
	crashSubset                  // some were made
	crashTorn                    // some were made, some in part: sector by sector
)

func (k crashKind) String() string { return [...]string{"whole", "subset", "torn"}[k] }

// fate is what becomes of a call that was not synced.
type fate uint8

const (
	made fate = iota
	lost
	torn
)

// crashes yields what the file may hold after the first n calls, for each n from 0 to all: exactly these calls, and, if
// some of them are not synced, versions in which some of those are lost or torn. at says how many versions there
// shall be for an n, and less than 0 to leave the n out.
func (l *crashLog) crashes(rng *rand.Rand, at func(n int) int) iter.Seq[crash] {
	return func(yield func(crash) bool) {
		all, durable := l.base.clone(), l.base.clone() // after all calls; after those up to the last sync
		synced := 0
		for n := 0; ; n++ {
			if synced == n && n > 0 {
				durable = all.clone()
			}
			versions := at(n)
			if versions >= 0 && !yield(crash{n, crashWhole, &memFile{name: l.name, content: all.clone()}}) {
				return
			}
			last := n == len(l.calls) || l.calls[n].kind == callSync
			for _, fates := range tails(rng, n-synced, last, versions) {
				state := durable.clone()
				for i, c := range l.calls[synced:n] {
					c.applyFate(state, fates[i], rng)
				}
				if !yield(crash{n, kindOf(fates), &memFile{name: l.name, content: state}}) {
					return
				}
			}
			if n == len(l.calls) {
				return
			}
			l.calls[n].apply(all)
			if l.calls[n].kind == callSync {
				synced = n + 1
			}
		}
	}
}

// fewCalls is how many unsynced calls are tried in all combinations.
const fewCalls = 4

// tails returns at most most fates of k calls of which none is synced. Those that do without the latest call belong to a
// crash before it. last says that no longer tail follows: then each call is tried alone, and each is left out.
func tails(rng *rand.Rand, k int, last bool, most int) [][]fate {
	if k == 0 || most <= 0 {
		return nil
	}
	var all [][]fate
	with := func(of func(i int) fate) {
		fates := make([]fate, k)
		for i := range fates {
			fates[i] = of(i)
		}
		all = append(all, fates)
	}
	whenever := func(b bool) fate {
		if b {
			return made
		}
		return lost
	}
	switch {
	case k <= fewCalls:
		for set := range 1<<(k-1) - 1 { // all made is no subset
			with(func(i int) fate { return whenever(i == k-1 || set>>i&1 != 0) })
		}
	case last:
		for j := range k {
			with(func(i int) fate { return whenever(i == j) })
			with(func(i int) fate { return whenever(i != j) })
		}
	default:
		with(func(i int) fate { return whenever(i == k-1) })
		drop := rng.IntN(k - 1)
		with(func(i int) fate { return whenever(i != drop) })
		with(func(i int) fate { return whenever(i == k-1 || rng.IntN(2) == 0) })
	}
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	// A part of them is for torn calls.
	all = all[:min(len(all), max(most-1-most/4, 0))]
	for range max(1, most/4) {
		with(func(i int) fate { return fate(rng.IntN(3)) })
	}
	return all
}

func kindOf(fates []fate) crashKind {
	if slices.Contains(fates, torn) {
		return crashTorn
	}
	return crashSubset
}

// applyFate makes what was made of a call.
func (c fileCall) applyFate(s *sparse, f fate, rng *rand.Rand) {
	switch {
	case f == lost:
	case f == made || c.kind == callTruncate:
		c.apply(s)
	default:
		for at := c.off; at < c.off+c.n; {
			next := min(c.off+c.n, (at/format.SectorSize+1)*format.SectorSize)
			if rng.IntN(2) == 0 {
				c.part(at, next).apply(s)
			}
			at = next
		}
	}
}

// part is the call for the bytes from to to only.
func (c fileCall) part(from, to int64) fileCall {
	p := fileCall{kind: c.kind, off: from, n: to - from}
	if c.kind == callWrite {
		p.data = c.data[from-c.off : to-c.off]
	}
	return p
}

func TestCrashLog(t *testing.T) {
	f := newMemFile("mem")
	log := f.record()
	must(t, write(f, 100, "hello"))
	must(t, f.Sync())
	must(t, write(f, 5000, "world"))
	must(t, f.PunchHole(100, 5))
	must(t, f.Truncate(9000))

	var sizes []int64
	seen := map[[2]int64]bool{} // length, and whether the punch was made
	for c := range log.crashes(rand.New(rand.NewPCG(1, 1)), func(int) int { return 100 }) {
		size := c.file.content.size
		p := make([]byte, 1)
		c.file.content.readAt(p, 100)
		switch {
		case c.kind == crashWhole:
			sizes = append(sizes, size)
		case c.calls >= 2 && size < 105:
			t.Fatal("a synced write is lost")
		case c.calls == 5 && c.kind == crashSubset:
			seen[[2]int64{size, int64(p[0])}] = true
		}
	}
	if want := []int64{0, 105, 105, 5005, 5005, 9000}; !slices.Equal(sizes, want) {
		t.Errorf("sizes after each call %v, want %v", sizes, want)
	}
	if !seen[[2]int64{9000, 0}] || !seen[[2]int64{9000, 'h'}] {
		t.Errorf("of three unsynced calls not all subsets with the third were tried: %v", seen)
	}
}

// TestTails counts: each subset of a few calls comes once, and for many calls each alone and each left out.
func TestTails(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	subsets := map[string]bool{}
	for k := range fewCalls + 1 {
		for _, fates := range tails(rng, k, false, 100) {
			if kindOf(fates) == crashSubset && fates[k-1] == made {
				subsets[string(append([]byte{byte(k)}, toBytes(fates)...))] = true
			}
		}
	}
	if len(subsets) < 1+3+7 {
		t.Errorf("%d subsets of at most %d calls", len(subsets), fewCalls)
	}
	alone, without := map[int]bool{}, map[int]bool{}
	for _, fates := range tails(rng, 9, true, 100) {
		switch count := len(slices.DeleteFunc(slices.Clone(fates), func(f fate) bool { return f != made })); {
		case slices.Contains(fates, torn):
		case count == 1:
			alone[slices.Index(fates, made)] = true
		case count == 8:
			without[slices.Index(fates, lost)] = true
		}
	}
	if len(alone) != 9 || len(without) != 9 {
		t.Errorf("of 9 calls %d alone, %d left out", len(alone), len(without))
	}
}

func toBytes(fates []fate) []byte {
	b := make([]byte, len(fates))
	for i, f := range fates {
		b[i] = byte(f)
	}
	return b
}

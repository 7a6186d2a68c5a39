package format

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestCounts does the same to refcount blocks of each width and to plain numbers.
func TestCounts(t *testing.T) {
	for order := range uint(7) {
		t.Run(fmt.Sprint(1<<order, " bits"), func(t *testing.T) {
			g := NewGeometry(9, order, false)
			c, plain := g.NewCounts(2), make([]uint64, 2*g.BlockCounts)
			if c.Len() != int64(len(plain)) {
				t.Fatalf("%d counts, want %d", c.Len(), len(plain))
			}
			rng := rand.New(rand.NewPCG(1, uint64(order)))
			for range 3000 {
				i := rng.Int64N(c.Len())
				n := 1 + rng.Int64N(min(c.Len()-i, 200))
				part := plain[i : i+n]
				v := min(rng.Uint64N(3), c.Max())
				if rng.IntN(9) == 0 {
					v = c.Max()
				}
				switch rng.IntN(4) {
				case 0:
					c.Set(i, v)
					plain[i] = v
				case 1:
					c.Fill(i, n, v)
					for k := range part {
						part[k] = v
					}
				case 2:
					addToBoth(t, c, plain, i, n, 1-2*rng.IntN(2))
				case 3:
					index := func(match func(uint64) bool) int64 {
						if k := slices.IndexFunc(part, match); k >= 0 {
							return i + int64(k)
						}
						return i + n
					}
					if got, want := c.Find(i, n, v), index(func(x uint64) bool { return x == v }); got != want {
						t.Fatalf("the first %d from %d on is at %d, want %d", v, i, got, want)
					}
					if got, want := c.Alike(i, n, v), index(func(x uint64) bool { return x != v }); got != want {
						t.Fatalf("the %d from %d on end at %d, want %d", v, i, got, want)
					}
				}
				for k, want := range plain {
					if got := c.Get(int64(k)); got != want {
						t.Fatalf("count %d is %d, want %d", k, got, want)
					}
				}
			}
		})
	}
}

// addToBoth expects that nothing changes where a count would leave its range.
func addToBoth(t *testing.T, c Counts, plain []uint64, i, n int64, delta int) {
	t.Helper()
	part := plain[i : i+n]
	end, want := uint64(0), ErrCorrupt
	if delta > 0 {
		end, want = c.Max(), ErrLimit
	}
	fell, err := c.Add(i, n, delta)
	if slices.Contains(part, end) {
		if !errors.Is(err, want) {
			t.Fatalf("add %d to a count of %d: %v, want %v", delta, end, err, want)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for k := range part {
		part[k] += uint64(int64(delta))
	}
	if delta < 0 && (fell.ToZero != slices.Contains(part, 0) || fell.ToOne != slices.Contains(part, 1)) {
		t.Fatalf("%+v, and the counts are %d", fell, part)
	}
}

// TestBlocks splits runs of clusters at the borders of refcount blocks.
func TestBlocks(t *testing.T) {
	g := NewGeometry(9, 4, false) // 256 counts
	var got []int64
	must(t, g.EachBlock(Run{First: 250, N: 300}, func(block, i, n int64) error {
		got = append(got, block, i, n)
		return nil
	}))
	if want := []int64{0, 250, 6, 1, 0, 256, 2, 0, 38}; !slices.Equal(got, want) {
		t.Errorf("parts %v, want %v", got, want)
	}
	if got := slices.Collect(g.BlocksOf(Run{First: 255, N: 2})); !slices.Equal(got, []int64{0, 1}) {
		t.Errorf("clusters 255 and 256 are counted in blocks %v", got)
	}
	rs := Runs{{First: 0, N: 600}, {First: 1024, N: 1}}
	var all int64
	for part, blocks := range g.ByBlocks(rs, 2) {
		all += part.Clusters()
		if len(blocks) > 2 {
			t.Errorf("%d blocks at once", len(blocks))
		}
	}
	if all != rs.Clusters() {
		t.Errorf("%d clusters of %d", all, rs.Clusters())
	}
}

// TestRuns joins neighbours.
func TestRuns(t *testing.T) {
	var rs Runs
	for _, r := range []Run{{First: 5, N: 2}, {First: 7, N: 1}, {First: 9, N: 0}, {First: 9, N: 1}} {
		rs.Add(r)
	}
	if want := (Runs{{First: 5, N: 3}, {First: 9, N: 1}}); !slices.Equal(rs, want) {
		t.Errorf("runs %v, want %v", rs, want)
	}
}

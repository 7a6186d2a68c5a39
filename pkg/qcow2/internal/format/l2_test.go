package format

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestL2Entry keeps each kind of entry through a table, standard and extended.
func TestL2Entry(t *testing.T) {
	const host = 5 << 16
	for _, extended := range []bool{false, true} {
		g := NewGeometry(16, 4, extended)
		for _, c := range []struct {
			e    L2Entry
			kind ClusterKind
			want error // of the check of a version 3 image
			only bool  // extended entries only
		}{
			{L2Entry{}, KindUnallocated, nil, false},
			{L2Entry{Sub: SubZero}, KindZero, nil, false},
			{L2Entry{host, SubZero}, KindZeroAlloc, nil, false},
			{OwnEntry(host, SubAllocated), KindData, nil, false},
			{L2Entry{host, SubAllocated}, KindData, nil, false},
			{L2Entry{host, 1 | 1<<(Subclusters+1)}, KindMixed, nil, true},
			{L2Entry{host, 1 | 1<<Subclusters}, KindMixed, ErrCorrupt, true},
			{L2Entry{0, 1}, KindMixed, ErrCorrupt, true},
			{L2Entry{host + 512, SubAllocated}, KindData, ErrCorrupt, false},
			{L2Entry{host | 1<<57, SubAllocated}, KindData, ErrCorrupt, false},
			{L2Entry{Desc: FlagCompressed | 1<<54 | host}, KindCompressed, nil, false},
		} {
			if c.only && !extended {
				continue
			}
			table := g.NewTable()
			table.Set(7, c.e)
			got := table.Entry(7)
			if got != c.e || got.Kind() != c.kind {
				t.Errorf("extended %t: %+v became %+v of kind %d", extended, c.e, got, got.Kind())
			}
			if err := got.Check(g, 3); !errors.Is(err, c.want) {
				t.Errorf("extended %t: %+v: %v, want %v", extended, c.e, err, c.want)
			}
			for i := range table.Len() {
				if i != 7 && table.Entry(i) != (L2Entry{}) {
					t.Errorf("entry %d became %+v", i, table.Entry(i))
				}
			}
		}
	}
}

// TestEntryRuns finds in random tables what the entries say one by one.
func TestEntryRuns(t *testing.T) {
	for _, extended := range []bool{false, true} {
		t.Run(fmt.Sprint("extended ", extended), func(t *testing.T) {
			g := NewGeometry(14, 4, extended)
			rng := rand.New(rand.NewPCG(2, 3))
			for range 200 {
				table, host := g.NewTable(), int64(1)
				want := map[Cluster]bool{} // host clusters
				for i := range table.Len() {
					if rng.IntN(4) == 0 {
						host += 1 + rng.Int64N(3)
					}
					e := L2Entry{uint64(host) << g.ClusterBits, SubAllocated}
					switch rng.IntN(8) {
					case 0:
						e = L2Entry{}
					case 1:
						e.Sub = SubZero
					case 2:
						e = e.WithCopied(true)
					case 3:
						e = L2Entry{Desc: FlagCompressed | uint64(host)<<g.ClusterBits}
					}
					table.Set(i, e)
					if hosts := e.HostClusters(g); hosts.N > 0 {
						want[hosts.First] = true
						host++
					}
				}
				rs, err := table.EntryRuns(g, 3, nil)
				must(t, err)
				got := map[Cluster]bool{}
				for _, r := range rs {
					for c := r.Hosts.First; c < r.Hosts.End(); c++ {
						got[c] = true
					}
					if e := table.Entry(r.First); e.Copied() != r.Copied || (e.Kind() == KindCompressed) != r.Packed {
						t.Fatalf("run %+v begins with %+v", r, e)
					}
				}
				if len(got) != len(want) {
					t.Fatalf("%d host clusters, want %d", len(got), len(want))
				}
				had := slices.ContainsFunc(rs, func(r EntryRun) bool { return r.Copied })
				if table.ClearCopied() != had {
					t.Fatal("ClearCopied does not tell whether an entry was COPIED")
				}
				if rs, err = table.EntryRuns(g, 3, nil); err != nil || slices.ContainsFunc(rs, func(r EntryRun) bool { return r.Copied }) {
					t.Fatalf("an entry is COPIED still, %v", err)
				}
			}
		})
	}
}

// TestChunks splits requests at the borders of L2 tables, and what is to be zeroed at those of clusters.
func TestChunks(t *testing.T) {
	g := NewGeometry(9, 4, false) // a table maps 32 KiB
	var got []Chunk
	must(t, g.Chunks(32<<10-100, 200, func(c Chunk) error {
		got = append(got, c)
		return nil
	}))
	want := []Chunk{{Off: 32<<10 - 100, N: 100, Table: 0, First: 63, Last: 63}, {Off: 32 << 10, N: 100, Table: 1}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	for _, c := range []struct {
		off     GuestOffset
		n, size int64
		lengths []int64
	}{
		{0, 1024, 4096, []int64{1024}},
		{100, 1024, 4096, []int64{412, 512, 100}},
		{512, 100, 4096, []int64{100}},
		{512, 100, 612, []int64{100}}, // all of the disk that is in the cluster
		{100, 512, 4096, []int64{512}},
	} {
		var lengths []int64
		chunk := g.Chunk(c.off, c.n)
		for _, p := range g.WholeClusters(chunk, c.size) {
			lengths = append(lengths, p.N)
		}
		if !slices.Equal(lengths, c.lengths) {
			t.Errorf("%d bytes at %d of %d: parts of %v, want %v", c.n, c.off, c.size, lengths, c.lengths)
		}
	}
}

package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// What a diff does not name reads the same in both states, and what it names was written, zeroed or discarded in between, or lies
// in a cluster that was.
func TestDiff(t *testing.T) {
	for name, o := range map[string]CreateOptions{"512": {ClusterSize: 512}, "64K": {ClusterSize: 64 << 10}} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile(name)
			must(t, Create(t.Context(), f, 4<<20, o))
			diffHistory(t, f)
			checkSaved(t, f)
		})
	}
	for name, options := range map[string]string{"subclusters": "extended_l2=on,cluster_size=32k", "version 2": "compat=0.10,cluster_size=4k"} {
		t.Run(name, func(t *testing.T) {
			path := tempImage(t)
			qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, "4M")
			f := loadMemFile(t, path)
			diffHistory(t, f)
			checkSaved(t, f)
		})
	}
}

// diffHistory changes the disk between snapshots, and compares each two of these and the disk.
func diffHistory(t *testing.T, f *memFile) {
	t.Helper()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	rng := rand.New(rand.NewPCG(1, 2))
	const snapshots = 5
	touched := make([][]bool, snapshots) // by sector, since each snapshot
	for i := range snapshots {
		touched[i] = make([]bool, img.Size()/512)
		must(t, errOf(img.CreateSnapshot(t.Context(), fmt.Sprint(i), nil)))
		if i == 3 {
			must(t, img.Flush()) // two that are equal
			continue
		}
		for range 20 {
			n := 512 * (1 + rng.Int64N(200))
			off := 512 * rng.Int64N((img.Size()-n)/512)
			switch rng.IntN(4) {
			case 0:
				must(t, img.Discard(off, n))
			case 1:
				must(t, img.WriteZeroes(off, n))
			default:
				must(t, errOf(img.WriteAt(bytes.Repeat([]byte{byte(rng.IntN(255) + 1)}, int(n)), off)))
			}
			for _, since := range touched[:i+1] {
				for k := off / 512; k < (off+n)/512; k++ {
					since[k] = true
				}
			}
		}
	}
	for i := range snapshots {
		from, err := img.OpenSnapshot(ByName(fmt.Sprint(i)))
		must(t, err)
		checkDiff(t, img.Active(), from, touched[i])
		for k := i + 1; k < snapshots; k++ {
			to, err := img.OpenSnapshot(ByName(fmt.Sprint(k)))
			must(t, err)
			checkDiff(t, to, from, touched[i])
			checkDiff(t, from, to, touched[i])
			must(t, to.Close())
		}
		must(t, from.Close())
	}
	must(t, img.Close())
}

// checkDiff compares the contents of two states, and holds what Diff says against it, and against the sectors that were touched
// between them at the most.
func checkDiff(t *testing.T, v, from *View, touched []bool) {
	t.Helper()
	now, before := make([]byte, v.Size()), make([]byte, from.Size())
	must(t, errOf(v.ReadAt(now, 0)))
	must(t, errOf(from.ReadAt(before, 0)))
	equal := func(off, end int64) bool { return bytes.Equal(now[off:end], before[off:end]) }
	at := int64(0)
	must(t, v.Diff(t.Context(), from, func(c Change) error {
		switch {
		case c.Offset < at || c.Length <= 0:
			t.Fatalf("%+v after %d", c, at)
		case !equal(at, c.Offset):
			t.Errorf("something between %d and %d is not told", at, c.Offset)
		case c.Zero && len(bytes.Trim(now[c.Offset:c.Offset+c.Length], "\x00")) > 0:
			t.Errorf("%+v is no zeros", c)
		}
		at = c.Offset + c.Length
		cluster := v.img.ClusterSize() / 512
		first, end := c.Offset/512/cluster*cluster, min((at/512+cluster-1)/cluster*cluster, int64(len(touched)))
		for ; first < end; first += cluster {
			if !slices.Contains(touched[first:min(first+cluster, end)], true) {
				t.Errorf("%+v: nobody has touched the cluster at %d", c, first*512)
			}
		}
		return nil
	}))
	if !equal(at, v.Size()) {
		t.Errorf("something behind %d is not told", at)
	}
}

// What a disk has behind the end of an older and smaller state was zeros before.
func TestDiffOfGrownDisk(t *testing.T) {
	f := newMemFile("grown")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	must(t, errOf(img.CreateSnapshot(t.Context(), "small", nil)))
	must(t, img.Resize(t.Context(), 1<<40))
	must(t, errOf(img.WriteAt([]byte("data"), 1<<39)))
	from, err := img.OpenSnapshot(ByName("small"))
	must(t, err)
	var got []Change
	collect := func(c Change) error { got = append(got, c); return nil }
	must(t, img.Active().Diff(t.Context(), from, collect))
	if want := (Change{1 << 39, 64 << 10, false}); len(got) != 1 || got[0] != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	got = nil
	must(t, from.Diff(t.Context(), img.Active(), collect))
	if len(got) > 0 {
		t.Errorf("of the smaller disk: %+v", got)
	}
	must(t, from.Close())
	must(t, img.Close())
	checkSaved(t, f)
}

func TestDiffRefuses(t *testing.T) {
	var views []*View
	for _, name := range []string{"one", "other"} {
		f := newMemFile(name)
		must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
		img, err := Open(f, OpenOptions{})
		must(t, err)
		t.Cleanup(func() { must(t, img.Close()) })
		must(t, errOf(img.WriteAt([]byte{1}, 0)))
		must(t, errOf(img.CreateSnapshot(t.Context(), "s", nil)))
		must(t, errOf(img.WriteAt([]byte{2}, 0)))
		views = append(views, img.Active())
	}
	nothing := func(Change) error { return nil }
	if err := views[0].Diff(t.Context(), views[1], nothing); !errors.Is(err, ErrUnsupported) {
		t.Errorf("two images: %v", err)
	}
	from, err := views[0].img.OpenSnapshot(ByName("s"))
	must(t, err)
	t.Cleanup(func() { must(t, from.Close()) })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := views[0].Diff(ctx, from, nothing); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	full := errors.New("full")
	if err := views[0].Diff(t.Context(), from, func(Change) error { return full }); !errors.Is(err, full) {
		t.Errorf("refused by the caller: %v", err)
	}
}

package qcow2

import "testing"

// syncsOf returns how many syncs fn costs.
func syncsOf(f *memFile, fn func()) (n int) {
	log := f.record()
	fn()
	for _, c := range log.calls {
		if c.kind == callSync {
			n++
		}
	}
	return n
}

// What an operation costs is, above all, its syncs (C6).
func TestSyncs(t *testing.T) {
	f := newMemFile("syncs")
	must(t, Create(t.Context(), f, 1<<30, CreateOptions{}))
	const cluster = 1 << 16
	var img *Image
	open := func() {
		var err error
		img, err = Open(f.reopen(), OpenOptions{})
		must(t, err)
	}
	write := func(off int64) func() {
		return func() {
			_, err := img.WriteAt(stamp(1, off, 4096), off)
			must(t, err)
			img.background.Wait() // the next reservation is made ahead of need
			must(t, img.Flush())
		}
	}
	create := func(name string) func() {
		return func() {
			_, err := img.CreateSnapshot(t.Context(), name, nil)
			must(t, err)
		}
	}
	open()
	write(0)() // makes the first reservation
	for _, c := range []struct {
		what string
		do   func()
		want int
	}{
		{"flush of nothing", func() { must(t, img.Flush()) }, 0},
		{"write in place, and flush", write(0), 1},
		{"write to a new cluster, which is known to read as zeros, and flush", write(cluster), 1},
		{"the same with a new L2 table", write(512 << 20), 1},
		{"create amid guests' requests, for which clusters are reserved first", create("a"), 3},
		{"write to a shared cluster, and flush", write(0), 2},
		{"discard, and flush", func() { must(t, img.Discard(512<<20, cluster)); must(t, img.Flush()) }, 1},
		{"close, which gives the reservation back", func() { must(t, img.Close()) }, 1},
		{"open, for what a killed process has not synced", open, 1},
		{"create", create("b"), 2},
		{"create another", create("c"), 2},
		{"goto", func() { must(t, img.GotoSnapshot(t.Context(), ByName("a"))) }, 2},
		{"delete", func() { must(t, img.DeleteSnapshot(t.Context(), ByName("b"))) }, 2},
		{"close after that", func() { must(t, img.Close()) }, 0},
	} {
		if got := syncsOf(f, c.do); got != c.want {
			t.Errorf("%s: %d syncs, want %d", c.what, got, c.want)
		}
	}
}

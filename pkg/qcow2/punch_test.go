package qcow2

import "testing"

// TestTakeWhilePunching: while the free clusters of a refcount block are being punched, guests get clusters of the same
// block behind the end of the file, not far away in the next one; and those are not punched.
func TestTakeWhilePunching(t *testing.T) {
	f := newMemFile("punching")
	must(t, Create(f, 64<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	a := img.alloc
	end := a.g.clusters(a.length.Load())
	a.unsafe, a.unsafeEnd = map[int64]struct{}{0: {}}, end
	got, err := a.take(3)
	must(t, err)
	for _, r := range got {
		if r.first < end || r.end() > end+a.g.blockCounts/2 {
			t.Errorf("clusters %d to %d were taken, the file ends at %d", r.first, r.end(), end)
		}
	}
	for _, r := range a.freeIn(0) {
		if r.end() > end {
			t.Errorf("clusters up to %d are to be punched, those from %d on can be taken", r.end(), end)
		}
	}
	a.reopen(0, nil)
	must(t, a.release(got))
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

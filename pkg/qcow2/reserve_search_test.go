package qcow2

import (
	"errors"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// scatteredImage opens an image in which every second cluster of data is free, and no refcount block is in memory yet.
func scatteredImage(t *testing.T) (*memFile, *Image) {
	t.Helper()
	const size, cluster = 16 << 20, 4096
	f := newMemFile("scattered")
	must(t, Create(t.Context(), f, size, CreateOptions{ClusterSize: cluster}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(pattern(1, size), 0)
	must(t, err)
	for off := int64(0); off < size; off += 2 * cluster {
		must(t, img.Discard(off, cluster))
	}
	must(t, img.Close())
	img, err = Open(f.reopen(), OpenOptions{})
	must(t, err)
	return f, img
}

// A reservation of scattered clusters comes in rounds, between which flushes can take the ledger; and nobody waits for the
// disk in order to take a cluster that is ready. The same goes for a release.
func TestReserveScattered(t *testing.T) {
	f, img := scatteredImage(t)
	a := img.alloc
	punches, most := 0, 0
	f.setFault(func(c fileCall) error {
		switch c.kind {
		case callPunch:
			punches++
			most = max(most, punches)
		case callSync:
			punches = 0
		}
		return nil
	})
	f.between = func() {
		if !a.mu.TryLock() {
			t.Error("a call of the file is made with the allocator's lock held")
			return
		}
		a.mu.Unlock()
	}
	const n = 300
	must(t, a.reserve(n))
	if got := a.ready.Clusters(); got < n {
		t.Errorf("%d clusters are ready, of %d", got, n)
	}
	if most > maxClaimed || most < maxClaimed/2 {
		t.Errorf("%d punches in one round, at most %d are wanted, and many", most, maxClaimed)
	}
	for c := range a.next {
		if b, err := a.rc.block(a.g.BlockOf(c)); err != nil || b.counts.Get(a.g.InBlock(c)) == 0 {
			t.Fatalf("cluster %d is free (%v), and the next search begins at %d", c, err, a.next)
		}
	}
	got, err := a.take(n / 2)
	must(t, err)
	img.background.Wait()
	clear(a.rc.blocks) // writeBack has written them
	must(t, a.release(got))

	f.between = nil
	f.setFault(nil)
	must(t, img.Close())
	checkSaved(t, f)
}

// beginClaim begins a search for n clusters.
func beginClaim(img *Image, n int64) claim {
	img.alloc.ledger.Lock()
	return claim{a: img.alloc, at: img.alloc.next, next: img.alloc.next, missing: n, need: n}
}

// endClaim takes it back and closes the image.
func endClaim(t *testing.T, img *Image, c *claim) {
	t.Helper()
	c.a.mu.Lock()
	c.undo()
	c.a.mu.Unlock()
	c.a.ledger.Unlock()
	must(t, img.Close())
}

// What a search skips because it is being punched is found by the next one.
func TestClaimSkipsUnsafe(t *testing.T) {
	_, img := scatteredImage(t)
	a := img.alloc
	c := beginClaim(img, 4)
	a.unsafe, a.unsafeEnd = map[int64]struct{}{0: {}}, a.g.ClusterBehind(a.fileEnd())
	must(t, c.step())
	a.reopen(0, a.freeIn(0))
	must(t, c.search())
	if next, err := a.rc.block(0); err != nil || a.next > a.g.Counted(0, next.counts.NextZero(0)) {
		t.Errorf("the next search begins at %d, and cluster %d is free (%v)", a.next, next.counts.NextZero(0), err)
	}
	endClaim(t, img, &c)
}

// A reservation that has made a refcount block fails when an operation has already given that block up in its generation:
// no other count suffers.
func TestFailedReservationBesideOperation(t *testing.T) {
	f := newMemFile("reservation")
	must(t, Create(t.Context(), f, 64<<20, CreateOptions{ClusterSize: 4096}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	a := img.alloc
	first := a.g.Counted(1, 0) // that no block counts
	placed := false
	must(t, img.change(t.Context(), operation{
		begin: func(*generation) error { return nil },
		build: func(n *generation) error {
			var taken format.Run
			n.next = first + 100
			err := n.locked(func() (err error) {
				taken, err = n.take(1)
				return err
			})
			must(t, err)
			a.next = first
			f.between = func() {
				if !placed && a.mu.TryLock() {
					a.mu.Unlock()
					placed = true
					must(t, n.placeBlocks())
				}
			}
			f.setFault(func(c fileCall) error {
				if c.kind == callTruncate {
					return ErrNoSpace
				}
				return nil
			})
			if err := a.reserve(8); !errors.Is(err, ErrNoSpace) {
				t.Errorf("a reservation on a full disk: %v", err)
			}
			f.setFault(nil)
			f.between = nil
			return n.locked(func() error { return n.add(taken, -1) })
		},
	}))
	if b, err := a.rc.block(0); err != nil || b.counts.Get(0) != 1 || !placed {
		t.Fatalf("the header is counted %d times (%v)", b.counts.Get(0), err)
	}
	_, err = img.WriteAt(pattern(1, 3<<20), 0)
	must(t, err)
	must(t, img.Close())
	checkSaved(t, f)
}

// What becomes free behind a search is found by the next one.
func TestClaimBesidePunching(t *testing.T) {
	_, img := scatteredImage(t)
	a := img.alloc
	c := beginClaim(img, 8)
	for len(c.got) < 2 {
		must(t, c.step())
	}
	low := c.got[0].First - 1
	a.reopen(0, format.Runs{{First: low, N: 1}}) // as the end of an operation does
	must(t, c.search())
	if a.next != low {
		t.Errorf("the next search begins at %d, and cluster %d has become free", a.next, low)
	}
	endClaim(t, img, &c)
}

// Refcount blocks that are not dirty do not fill memory; those used last stay.
func TestRefcountBlocksInMemory(t *testing.T) {
	const limit, many = 4, 10
	g := format.NewGeometry(16, 4, false)
	rc := &refcounts{g: g, table: make([]format.HostOffset, many+1), blocks: map[int64]*refBlock{}, limit: limit}
	for k := range int64(many) {
		rc.table[k] = g.Offset(format.Cluster(k + 1))
		b := &refBlock{counts: g.NewCounts(1)}
		b.dirty.Add(0)
		rc.keep(k, b)
	}
	if len(rc.blocks) != many || !rc.crowded() {
		t.Errorf("%d blocks, of %d that are dirty; crowded: %v", len(rc.blocks), many, rc.crowded())
	}
	_, err := rc.block(0)
	must(t, err)
	rc.wrote(rc.takeDirty(), nil)
	for range 3 {
		rc.keep(many, &refBlock{counts: g.NewCounts(1)})
		if len(rc.blocks) > limit+1 || rc.blocks[0] == nil || rc.blocks[many] == nil {
			t.Errorf("%d blocks stay in memory: the first one %t, the last one %t", len(rc.blocks), rc.blocks[0] != nil, rc.blocks[many] != nil)
		}
	}
}

package qcow2

import "testing"

// scatteredImage opens an image in which every second cluster of data is free, and no refcount block is in memory yet.
func scatteredImage(t *testing.T) (*memFile, *Image) {
	t.Helper()
	const size, cluster = 16 << 20, 4096
	f := newMemFile("scattered")
	must(t, Create(f, size, CreateOptions{ClusterSize: cluster}))
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
	if got := a.ready.clusters(); got < n {
		t.Errorf("%d clusters are ready, of %d", got, n)
	}
	if most > maxClaimed || most < maxClaimed/2 {
		t.Errorf("%d punches in one round, at most %d are wanted, and many", most, maxClaimed)
	}
	for c := range a.next {
		if b, err := a.rc.block(c >> a.g.blockBits); err != nil || b.counts.get(c&(a.g.blockCounts-1)) == 0 {
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
	if r, err := checkFile(t.Context(), f.clone()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	path := tempImage(t)
	f.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Error(q.output)
	}
}

// What becomes free behind a search is found by the next one.
func TestClaimBesidePunching(t *testing.T) {
	_, img := scatteredImage(t)
	a := img.alloc
	a.ledger.Lock()
	c := claim{a: a, at: a.next, next: a.next, missing: 8}
	for len(c.got) < 2 {
		must(t, c.step())
	}
	low := c.got[0].first - 1
	a.reopen(0, runs{{low, 1}}) // as the end of an operation does
	must(t, c.search())
	if a.next != low {
		t.Errorf("the next search begins at %d, and cluster %d has become free", a.next, low)
	}
	a.mu.Lock()
	c.undo()
	a.mu.Unlock()
	a.ledger.Unlock()
	must(t, img.Close())
}

// Refcount blocks that are not dirty do not fill memory; those used last stay.
func TestRefcountBlocksInMemory(t *testing.T) {
	const limit, many = 4, 10
	g := newGeometry(16, 4, false)
	rc := &refcounts{g: g, table: make([]int64, many+1), blocks: map[int64]*refBlock{}, limit: limit}
	for k := range int64(many) {
		rc.table[k] = (k + 1) << 16
		b := &refBlock{counts: g.newCounts(1)}
		b.dirty.add(0)
		rc.keep(k, b)
	}
	if len(rc.blocks) != many || !rc.crowded() {
		t.Errorf("%d blocks, of %d that are dirty; crowded: %v", len(rc.blocks), many, rc.crowded())
	}
	rc.wrote(rc.takeDirty(), nil)
	_, err := rc.block(0)
	must(t, err)
	rc.keep(many, &refBlock{counts: g.newCounts(1)})
	if len(rc.blocks) != limit || rc.blocks[0] == nil || rc.blocks[many] == nil {
		t.Errorf("%d blocks stay in memory, the first one %v", len(rc.blocks), rc.blocks[0])
	}
}

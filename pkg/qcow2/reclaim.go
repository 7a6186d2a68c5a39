package qcow2

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Reclaimed is what ReclaimLeaks has given back.
type Reclaimed struct {
	Clusters int64 // host clusters that are free now
	Lowered  int64 // host clusters that stay in use, and were counted too often
	Complete bool  // nothing is left that ReclaimLeaks can find
}

// ReclaimLeaks gives back what a crash has left counted and unused, while guests and operations on snapshots go on. It
// reads all metadata once, or more often for an image of many clusters, and takes 64 MiB of memory at most. ErrCorrupt, and
// nothing is given back, for metadata that is impossible. It ends early with ctx and when the image fails or is closed.
//
// Why it is safe: of a cluster whose count has not changed since the search began, each reference that there was then is
// still there, for taking one away lowers the count, and no new one has come, for that raises it. So it does not matter
// when the search comes by a table, as long as it sees the mapping as guests do. Clusters whose count changes meanwhile, or that
// are handed out of a reservation, are left alone.
func (img *Image) ReclaimLeaks(ctx context.Context) (Reclaimed, error) {
	var r Reclaimed
	err := img.reclaim(ctx, &r)
	if err != nil {
		err = fmt.Errorf("%s: reclaim leaks: %w", img.f.Name(), err)
	}
	return r, err
}

// reclaimRounds is how often a search is repeated because an operation came in between.
const reclaimRounds = 3

func (img *Image) reclaim(ctx context.Context, r *Reclaimed) error {
	r.Complete = true
	first := format.Cluster(0)
	for {
		end := first + leakSearchClusters
		last := false
		for round := range reclaimRounds {
			s, err := img.startLeakSearch(ctx, first, end)
			if err != nil {
				return err
			}
			last = s.last
			disturbed, err := img.searchLeaks(ctx, s, r)
			img.endLeakSearch()
			if err != nil {
				return err
			}
			if !disturbed {
				break
			}
			if round == reclaimRounds-1 {
				r.Complete = false
			}
		}
		if last {
			return nil
		}
		first = end
	}
}

// leakSearchClusters is how many host clusters a search looks at, in a byte each.
const leakSearchClusters = 64 << 20

// startLeakSearch begins at an instant at which no guest request is under way and no operation runs.
func (img *Image) startLeakSearch(ctx context.Context, first, end format.Cluster) (*leakSearch, error) {
	for {
		s, running, err := img.tryStartLeakSearch(first, end)
		if running == nil {
			return s, err
		}
		select {
		case <-running:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryStartLeakSearch returns what to wait for, if an operation runs.
func (img *Image) tryStartLeakSearch(first, end format.Cluster) (s *leakSearch, running <-chan struct{}, err error) {
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(true); err != nil {
		return nil, nil, err
	}
	a := img.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.build != nil {
		return nil, a.build.ended(), nil
	}
	all := a.g.ClusterBehind(a.fileEnd()) + maxBatch // a crash may leave clusters counted behind the end
	s = &leakSearch{first: first, seen: make([]uint8, max(0, min(end, all)-first)), last: end >= all}
	a.leakSearch = s
	return s, nil, nil
}

func (img *Image) endLeakSearch() {
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	img.alloc.leakSearch = nil
}

// searchLeaks counts all references to the clusters of s, and gives back what is counted more often. disturbed: there may be
// more.
func (img *Image) searchLeaks(ctx context.Context, s *leakSearch, r *Reclaimed) (disturbed bool, err error) {
	wasDisturbed := func() bool {
		img.alloc.mu.Lock()
		defer img.alloc.mu.Unlock()
		return s.disturbed
	}
	if err = img.countSnapshotReferences(ctx, s); err == nil {
		err = img.countActiveReferences(ctx, s)
	}
	if err != nil {
		if ctx.Err() == nil && img.failed() == nil && wasDisturbed() {
			return true, nil // a table of a snapshot that was deleted meanwhile, perhaps
		}
		return false, err
	}
	img.countMetadataReferences(s)
	for block := img.g.BlockOf(s.first); img.g.Counted(block, 0) < s.end(); block++ {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if err := img.lowerBlock(s, block, r); err != nil {
			return false, err
		}
	}
	return wasDisturbed(), nil
}

// countSnapshotReferences counts what snapshots reference. Nothing of it changes as long as the snapshot is there.
func (img *Image) countSnapshotReferences(ctx context.Context, s *leakSearch) error {
	img.mu.Lock()
	rows := slices.Clone(img.rows)
	img.mu.Unlock()
	var all []tableUse
	for i := range rows {
		if err := ctx.Err(); err != nil {
			return err
		}
		l1, err := img.snapshotL1(&rows[i])
		if err != nil {
			return err
		}
		for j, e := range l1 {
			if e == 0 {
				continue
			}
			if err := img.checkL1Entry(e); err != nil {
				return fmt.Errorf("L1 entry %d of snapshot %q: %w", j, rows[i].Name, err)
			}
			all = append(all, tableUse{offset: e.Offset(), times: 1})
		}
		all = mergeTables(all)
	}
	for _, l2 := range all {
		if err := ctx.Err(); err != nil {
			return err
		}
		t, err := format.ReadL2(img.f, img.g, l2.offset)
		if err == nil {
			err = img.countTableReferences(s, t, l2.offset, l2.times, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tableUse is an L2 table, and how many entries of snapshots' L1 tables point at it.
type tableUse struct {
	offset format.HostOffset
	times  int64
}

// mergeTables sorts tables, and adds up what leads to the same one.
func mergeTables(all []tableUse) []tableUse {
	slices.SortFunc(all, func(a, b tableUse) int { return cmp.Compare(a.offset, b.offset) })
	k := 0
	for i := range all {
		if k > 0 && all[k-1].offset == all[i].offset {
			all[k-1].times += all[i].times
			continue
		}
		all[k] = all[i]
		k++
	}
	return all[:k]
}

// countActiveReferences counts what the active state references, as guests see it.
func (img *Image) countActiveReferences(ctx context.Context, s *leakSearch) error {
	for i := int64(0); ; i++ {
		if err := cmp.Or(ctx.Err(), img.failed()); err != nil {
			return err
		}
		t, off, end, err := img.peekTable(i)
		if end || err != nil {
			return err
		}
		if off != 0 {
			if err := img.countTableReferences(s, t, off, 1, seenActive); err != nil {
				return err
			}
		}
	}
}

// peekTable returns a copy of an active L2 table and its offset, 0 if there is none. Guests' tables stay in the cache. A guest that
// wants the same table waits while it is read, as for another guest's read; all others go on.
func (img *Image) peekTable(index int64) (t format.L2Table, off format.HostOffset, end bool, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	for index < int64(len(img.l1)) {
		if cached := img.l2.peek(index); cached != nil {
			return img.g.Table(slices.Clone(cached.data.B)), cached.offset, false, nil
		}
		e := img.l1[index]
		if err := img.checkL1Entry(e); err != nil || e.Offset() == 0 {
			return format.L2Table{}, 0, false, err
		}
		if img.awaitTable(index) {
			continue
		}
		t := img.g.NewTable()
		if current, err := img.readTable(index, e, t); current {
			return t, e.Offset(), false, err
		}
	}
	return format.L2Table{}, 0, true, nil
}

// countTableReferences counts a table and what it maps.
func (img *Image) countTableReferences(s *leakSearch, t format.L2Table, off format.HostOffset, times int64, flag uint8) error {
	var rs format.Runs
	for i := range t.Len() {
		e := t.Entry(i)
		if e == (format.L2Entry{}) {
			continue
		}
		if err := e.Check(img.g, img.version); err != nil {
			return fmt.Errorf("L2 table at file offset %#x, entry %d: %w", off, i, err)
		}
		rs.Add(e.HostClusters(img.g))
	}
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	s.add(img.g.Cluster(off).Alone(), times, flag)
	for _, r := range rs {
		s.add(r, times, flag)
	}
	return nil
}

// countMetadataReferences counts all other metadata. What has moved since the search began was counted up and down, and is left
// alone.
func (img *Image) countMetadataReferences(s *leakSearch) {
	a := img.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	img.mu.Lock()
	defer img.mu.Unlock()
	h := img.hdr.Load()
	one := func(off format.HostOffset, n int64) { s.add(img.g.RunOf(off, n), 1, 0) }
	one(0, img.g.ClusterSize)
	one(h.L1Offset, h.L1Size*8)
	one(h.SnapshotsOffset, img.rowBytes)
	s.add(a.rc.tableAt, 1, 0)
	for _, off := range a.rc.table {
		if off != 0 {
			one(off, img.g.ClusterSize)
		}
	}
	for i := range img.rows {
		one(img.rows[i].L1Offset, img.rows[i].L1Size*8)
	}
}

// maxExcess is how much too high a count may be to be lowered: no crash leaves more, and damage is for Repair.
const maxExcess = 64

// lowerBlock lowers the counts of a refcount block, no commit being under way.
func (img *Image) lowerBlock(s *leakSearch, block int64, r *Reclaimed) error {
	img.commitMu.Lock()
	defer img.commitMu.Unlock()
	a := img.alloc
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := img.failed(); err != nil {
		return err
	}
	b, err := a.rc.block(block)
	if err != nil || b == nil {
		return err
	}
	img.excludePending(s)
	var excess [maxExcess + 1]format.Runs // by how much is to be taken off
	for c := max(img.g.Counted(block, 0), s.first); c < min(img.g.Counted(block+1, 0), s.end()); c++ {
		count, seen := b.counts.Get(img.g.InBlock(c)), s.seen[c-s.first]
		refs := uint64(seen & seenCount)
		if count <= refs || refs == uint64(seenCount) || count-refs > maxExcess {
			continue
		}
		if refs == 1 && seen&seenActive != 0 {
			continue // it would have to become COPIED
		}
		excess[count-refs].Add(c.Alone())
		if refs == 0 {
			r.Clusters++
		} else {
			r.Lowered++
		}
	}
	for times := range excess {
		for range times {
			if err := a.releaseLocked(excess[times]); err != nil {
				return img.fail(err)
			}
		}
	}
	return a.rc.writeBack()
}

// excludePending excludes what is reserved and what guests have given up: the one is not in use yet, the other still is,
// as far as the disk knows. Called with the allocator's lock held, and no commit under way.
func (img *Image) excludePending(s *leakSearch) {
	img.mu.Lock()
	defer img.mu.Unlock()
	pending := []format.Runs{img.alloc.ready, img.freed}
	if img.build != nil {
		pending = append(pending, img.build.deferred)
	}
	for _, rs := range pending {
		for _, r := range rs {
			s.touch(r)
		}
	}
}

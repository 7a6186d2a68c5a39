package qcow2

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// punchBytes is how much is punched at once: guests' writes wait for as long as that takes.
const punchBytes = 4 << 20

// worthPunch tells whether a run of free clusters is worth a punch. L2 tables take an eighth of a thousandth of what they
// map; scattered ones keep their blocks until they are used again, for a punch of each would take longer than all else.
func (a *allocator) worthPunch(r format.Run) bool {
	if r.N >= longRun {
		return true
	}
	for c := r.First; c < r.End(); c++ {
		if a.metadata.kind(c) == 0 {
			return true
		}
	}
	return false
}

// punchZeroed gives the blocks of clusters that became free back to the file system, in long runs, after the switch. Until
// then the allocator takes nothing of the old file from the refcount blocks in which they are counted. An error costs host blocks
// only: a free cluster is punched again before it is handed out.
func (n *generation) punchZeroed() {
	a := n.img.alloc
	for _, k := range slices.Sorted(maps.Keys(n.zeroed)) {
		free := a.freeIn(k)
		for _, r := range free {
			if !a.worthPunch(r) {
				continue
			}
			at := int64(n.g.Offset(r.First))
			for end := min(int64(n.g.Offset(r.End())), a.length.Load()); at < end; at += punchBytes {
				_ = a.f.PunchHole(at, min(punchBytes, end-at))
				n.pacePunch(min(punchBytes, end-at))
			}
		}
		a.reopen(k, free)
	}
}

// freeIn returns the clusters that block k counts as free, and that nobody can take meanwhile.
func (a *allocator) freeIn(k int64) format.Runs {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, err := a.rc.block(k)
	if err != nil || b == nil {
		return nil
	}
	var free format.Runs
	last := min(b.counts.Len(), int64(a.unsafeEnd-a.g.Counted(k, 0)))
	for i := b.counts.NextZero(0); i < last; {
		end := min(b.counts.NextNonzero(i), last)
		free.Add(format.Run{First: a.g.Counted(k, i), N: end - i})
		i = b.counts.NextZero(end)
	}
	return free
}

// reopen lets clusters be taken again that block k counts as free.
func (a *allocator) reopen(k int64, free format.Runs) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range free {
		a.metadata.remove(r)
		a.next = min(a.next, r.First)
	}
	delete(a.unsafe, k)
}

// PunchFree gives the blocks of all free clusters back to the file system, also of those that others have freed without doing
// so, and commits first. Guests wait. It ends early with ctx.
func (img *Image) PunchFree(ctx context.Context) error {
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(true); err != nil {
		return err
	}
	img.background.Wait()
	if err := img.commit(); err != nil {
		return err
	}
	if err := img.alloc.punchAll(ctx); err != nil {
		return fmt.Errorf("%s: give back free clusters: %w", img.f.Name(), err)
	}
	return nil
}

// punchAll punches all free clusters.
func (a *allocator) punchAll(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for k := range a.g.Blocks(a.g.Clusters(a.length.Load())) {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := a.rc.block(k)
		if err != nil {
			return err
		}
		if b == nil { // none of them is in use
			if err := a.punchHole(format.Run{First: a.g.Counted(k, 0), N: a.g.BlockCounts}); err != nil {
				return err
			}
			continue
		}
		for i := b.counts.NextZero(0); i < a.g.BlockCounts; {
			next := b.counts.NextNonzero(i)
			if err := a.punchHole(format.Run{First: a.g.Counted(k, i), N: next - i}); err != nil {
				return err
			}
			i = b.counts.NextZero(next)
		}
	}
	return nil
}

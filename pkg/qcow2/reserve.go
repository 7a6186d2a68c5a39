package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// take hands out n clusters, neighbours where possible. Whoever fails to use them gives them to release.
func (a *allocator) take(n int64) (format.Runs, error) {
	for {
		got, missing := a.takeReady(n)
		if missing == 0 {
			return got, nil
		}
		if err := a.reserve(n); err != nil {
			return nil, err
		}
	}
}

// takeReady hands out n reserved clusters, or says how many are missing.
func (a *allocator) takeReady(n int64) (got format.Runs, missing int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.ready.Clusters(); have < n {
		return nil, n - have
	}
	for n > 0 {
		r := a.ready[0]
		k := min(n, r.N)
		got.Add(format.Run{First: r.First, N: k})
		a.leakSearch.touch(format.Run{First: r.First, N: k})
		n -= k
		if a.ready[0] = r.Behind(k); k == r.N {
			a.ready = a.ready[1:]
		}
	}
	a.reserveAhead()
	return got, 0
}

// reserveAhead has clusters reserved in the background when half of the last reservation is used up. Called with mu held.
func (a *allocator) reserveAhead() {
	low := a.batch / 4 // it doubles each time
	if a.ahead || a.ready.Clusters() >= low {
		return
	}
	a.ahead = true
	a.background.Go(func() {
		_ = a.reserve(low) // whoever needs them will try again, and be told
		a.mu.Lock()
		a.ahead = false
		a.mu.Unlock()
	})
}

// reserve makes n clusters ready, in rounds between which others get at the counts. What it got before it fails is ready.
func (a *allocator) reserve(n int64) error {
	total := int64(0)
	for total < n {
		got, err := a.reserveRound(n)
		if err != nil {
			return fmt.Errorf("reserve %d clusters: %w", n, err)
		}
		if got == 0 { // somebody else did
			break
		}
		total += got
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if total > 0 {
		a.batch = min(max(a.batch, n)*2, batch(a.g, maxBatchBytes))
	}
	return nil
}

// reserveRound makes clusters ready, if n are not yet, and says how many; or it fails and has changed nothing.
func (a *allocator) reserveRound(n int64) (int64, error) {
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	n -= a.ready.Clusters()
	c := claim{a: a, at: a.next, next: a.next, missing: max(n, a.batch), need: n}
	a.mu.Unlock()
	if n <= 0 {
		return 0, nil
	}
	err := c.search()
	if err == nil {
		err = a.prepare(c.got)
	}
	if err == nil && len(c.newBlocks) > 0 {
		err = a.link(c.newBlocks)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		c.undo()
		return 0, err
	}
	for _, r := range c.got {
		a.ready.Add(r)
	}
	return c.got.Clusters(), nil
}

// prepare makes reserved clusters read as zeros and, with their counts, durable. Called with ledger held.
func (a *allocator) prepare(got format.Runs) error {
	for _, r := range got {
		if err := a.punchHole(r); err != nil {
			return err
		}
	}
	if err := a.writeBack(); err != nil {
		return err
	}
	if err := a.reach(got); err != nil {
		return err
	}
	return a.sync()
}

// reach makes the file at least so long that clusters lie inside it. Called with ledger held.
func (a *allocator) reach(rs format.Runs) error {
	a.growth.Lock()
	defer a.growth.Unlock()
	length, err := a.f.Size() // a new refcount block, or an operation, may have made it longer
	if err != nil {
		return err
	}
	end := max(length, a.length.Load())
	for _, r := range rs {
		end = max(end, int64(a.g.Offset(r.End())))
	}
	if end > length {
		if err := a.f.Truncate(end); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.length.Store(end)
	return nil
}

// link makes the refcount table point at new blocks, whose content is durable. Called with ledger held.
func (a *allocator) link(blocks []int64) error {
	for _, k := range blocks {
		var e [8]byte
		binary.BigEndian.PutUint64(e[:], uint64(a.rc.table[k]))
		if _, err := a.f.WriteAt(e[:], int64(a.g.Offset(a.rc.tableAt.First))+k*8); err != nil {
			// Whether the table on disk has the block is unknown now.
			return a.fail(fmt.Errorf("write refcount table entry %d: %w", k, err))
		}
	}
	return a.sync()
}

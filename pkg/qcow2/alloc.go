package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
)

// allocator hands out host clusters and takes them back. It reserves them in batches ahead of need (Spec A,
// W0): a cluster that it hands out is counted, and lies inside the file, durably; it reads as zeros; and
// nothing references it. What a crash leaves of a reservation is leaked, not lost.
type allocator struct {
	f            File
	g            geometry
	sync         func() error // of f; a failure fails the image
	fail         func(error) error
	switchHeader func(change func(*header)) error
	metadata     *metadataMap
	background   *sync.WaitGroup // the image's

	// ledger is held by whoever changes live counts and writes them, for as long as that takes. Taken before mu.
	ledger sync.Mutex
	// growth is held shared by an operation's write, which may lie behind the end of the file, and exclusively by whoever
	// makes the file longer by setting its length: else that could cut off what was written since it looked. Taken after
	// ledger, and before mu.
	growth sync.RWMutex

	mu     sync.Mutex // guards all below; never held while another lock of the image is taken, but for the header's
	rc     *refcounts
	search *leakSearch // of a running ReclaimLeaks, nil if there is none: it is told what happens to clusters
	build  *generation // of a running operation: it holds free clusters, and follows each change of a count
	// unsafe: refcount blocks whose free clusters are being punched, those before unsafeEnd. Nothing is taken of these.
	unsafe    map[int64]struct{}
	unsafeEnd int64
	next      int64        // no cluster below is free
	ready     runs         // reserved
	batch     int64        // clusters of the next reservation
	ahead     bool         // a reservation in the background is due or under way
	length    atomic.Int64 // of the file, bytes; changed with mu held
}

// A reservation starts small, so that a short visit leaks little when it crashes, and doubles while it is
// used up: what one sync can pay for.
const (
	firstBatchBytes  = 4 << 20
	beforeBuildBytes = 16 << 20 // when guests are about to copy on write
	maxBatchBytes    = 64 << 20
	maxBatch         = 4096 // clusters
)

// batch returns how many clusters to reserve at once for so many bytes: of small clusters fewer bytes.
func (g geometry) batch(bytes int64) int64 {
	return min(max(bytes>>g.clusterBits, 1), maxBatch*bytes/maxBatchBytes)
}

// newAllocator leaves the functions and the map of metadata to the image.
func newAllocator(f File, g geometry, h *header) (*allocator, error) {
	rc, err := loadRefcounts(f, g, h)
	if err != nil {
		return nil, err
	}
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	a := &allocator{f: f, g: g, rc: rc, next: 1, batch: g.batch(firstBatchBytes)}
	a.length.Store(length)
	return a, nil
}

// take hands out n clusters, neighbours where possible. Whoever fails to use them gives them to release.
func (a *allocator) take(n int64) (runs, error) {
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
func (a *allocator) takeReady(n int64) (got runs, missing int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.ready.clusters(); have < n {
		return nil, n - have
	}
	for n > 0 {
		r := a.ready[0]
		k := min(n, r.n)
		got.add(run{r.first, k})
		a.search.touch(run{r.first, k})
		n -= k
		if a.ready[0] = (run{r.first + k, r.n - k}); k == r.n {
			a.ready = a.ready[1:]
		}
	}
	a.reserveAhead()
	return got, 0
}

// reserveAhead has clusters reserved in the background when half of the last reservation is used up. Called with mu held.
func (a *allocator) reserveAhead() {
	low := a.batch / 4 // it doubles each time
	if a.ahead || a.ready.clusters() >= low {
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

// reserve makes n clusters ready, or fails and has changed nothing.
func (a *allocator) reserve(n int64) error {
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	n -= a.ready.clusters()
	if n <= 0 { // somebody else did
		a.mu.Unlock()
		return nil
	}
	n = max(n, a.batch)
	got, newBlocks, err := a.claim(n)
	a.mu.Unlock()
	if err == nil {
		err = a.prepare(got)
	}
	if err == nil && len(newBlocks) > 0 {
		err = a.link(newBlocks)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.unclaim(got, newBlocks)
		return fmt.Errorf("reserve %d clusters: %w", n, err)
	}
	for _, r := range got {
		a.ready.add(r)
	}
	a.batch = min(max(a.batch, n)*2, a.g.batch(maxBatchBytes))
	return nil
}

// unclaim takes claim back in memory. On disk counts may stay, which leaks; blocks that nothing points at
// are forgotten.
func (a *allocator) unclaim(got runs, newBlocks []int64) {
	for _, r := range got {
		a.next = min(a.next, r.first)
		_ = a.g.eachBlock(r, func(k, i, n int64) error {
			if b := a.rc.blocks[k]; b != nil {
				_, err := a.add(run{k<<a.g.blockBits + i, n}, -1)
				return err
			}
			return nil
		})
	}
	for _, k := range newBlocks {
		a.metadata.remove(run{a.rc.table[k] >> a.g.clusterBits, 1})
		if a.build != nil {
			_ = a.build.mirror(run{a.rc.table[k] >> a.g.clusterBits, 1}, -1)
		}
		a.rc.forget(k)
	}
}

// claim counts n free clusters in memory. newBlocks are the refcount blocks that it made on the way; the table
// on disk does not yet point at them.
func (a *allocator) claim(n int64) (got runs, newBlocks []int64, err error) {
	for c := a.next; n > 0; {
		if c, err = a.rc.nextFree(c); err != nil {
			return got, newBlocks, err
		}
		k := c >> a.g.blockBits
		if _, busy := a.unsafe[k]; busy && c < a.unsafeEnd {
			c = min((k+1)<<a.g.blockBits, a.unsafeEnd)
			continue
		}
		if !a.free(c) {
			c++
			continue
		}
		if k >= int64(len(a.rc.table)) {
			if err := a.growTable(); err != nil {
				return got, newBlocks, err
			}
			newBlocks = nil // the new table points at them
			continue
		}
		b, err := a.rc.block(k)
		if err != nil {
			return got, newBlocks, err
		}
		if b == nil {
			if err := a.newBlock(k, c); err != nil {
				return got, newBlocks, err
			}
			newBlocks = append(newBlocks, k)
			continue
		}
		i := c & (a.g.blockCounts - 1)
		end := i
		for end < a.g.blockCounts && end-i < n && b.counts.get(end) == 0 && a.free(c+end-i) {
			end++
		}
		r := run{c, end - i}
		if err := a.refuse(r); err != nil {
			return got, newBlocks, err
		}
		if _, err := a.add(r, 1); err != nil {
			return got, newBlocks, err
		}
		got.add(r)
		n, c = n-r.n, r.end()
		a.next = c
	}
	return got, newBlocks, nil
}

// free tells that no running operation holds a cluster whose count is 0.
func (a *allocator) free(c int64) bool {
	return a.build == nil || !a.build.holds(c) && !a.build.room.has(c)
}

// add changes live counts, and with them those of a generation that is being built.
func (a *allocator) add(r run, delta int) (zero runs, err error) {
	a.search.touch(r)
	zero, err = a.rc.add(r, delta)
	if err == nil && a.build != nil {
		err = a.build.mirror(r, delta)
	}
	return zero, err
}

// newBlock makes refcount block k in cluster c, a free one that it counts itself.
func (a *allocator) newBlock(k, c int64) error {
	r := run{c, 1}
	if err := a.refuse(r); err != nil {
		return err
	}
	if err := a.metadata.add(r, metadataSole); err != nil {
		return err
	}
	a.search.touch(r)
	b := &refBlock{counts: a.g.newCounts(1)}
	b.counts.set(c&(a.g.blockCounts-1), 1)
	for s := range a.g.clusterSize / sectorSize {
		b.dirty.add(s)
	}
	a.rc.table[k] = r.first << a.g.clusterBits
	a.rc.keep(k, b)
	if a.build != nil {
		return a.build.mirror(r, 1)
	}
	return nil
}

// maxGap is how far behind the end of the file, beyond its length once more, clusters may be counted, in bytes. A crash
// leaves some, for counts are written before the file grows.
const maxGap = 1 << 30

// refuse returns ErrCorrupt for what is known to be metadata although its count is 0, and for what lies so far behind the
// end of the file that the counts before it must be wrong: the file would become many times larger.
func (a *allocator) refuse(r run) error {
	if length := a.length.Load(); r.end()<<a.g.clusterBits > 2*length+maxGap {
		return fmt.Errorf("%s: %w: all clusters are in use, up to %d, but the file has only %d bytes", a.f.Name(), ErrCorrupt, r.first, length)
	}
	if err := a.metadata.refuse(r); err != nil {
		return fmt.Errorf("%s: allocate clusters %d to %d: %w", a.f.Name(), r.first, r.end()-1, err)
	}
	return nil
}

// prepare makes reserved clusters read as zeros and, with their counts, durable. Called with ledger held.
func (a *allocator) prepare(got runs) error {
	for _, r := range got {
		if at := r.first << a.g.clusterBits; at < a.length.Load() {
			if err := a.f.PunchHole(at, min(r.n<<a.g.clusterBits, a.length.Load()-at)); err != nil {
				return err
			}
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
func (a *allocator) reach(rs runs) error {
	a.growth.Lock()
	defer a.growth.Unlock()
	length, err := a.f.Size() // a new refcount block, or an operation, may have made it longer
	if err != nil {
		return err
	}
	end := max(length, a.length.Load())
	for _, r := range rs {
		end = max(end, r.end()<<a.g.clusterBits)
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

// writeBack writes what has changed in the refcount blocks. It does not sync. Called with ledger held, but not mu.
func (a *allocator) writeBack() error {
	a.mu.Lock()
	ws := a.rc.takeDirty()
	a.mu.Unlock()
	err := writeBlocks(a.f, ws)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rc.wrote(ws, err)
	return err
}

// link makes the refcount table point at new blocks, whose content is durable. Called with ledger held.
func (a *allocator) link(blocks []int64) error {
	for _, k := range blocks {
		var e [8]byte
		binary.BigEndian.PutUint64(e[:], uint64(a.rc.table[k]))
		if _, err := a.f.WriteAt(e[:], a.rc.tableAt.first<<a.g.clusterBits+k*8); err != nil {
			// Whether the table on disk has the block is unknown now.
			return a.fail(fmt.Errorf("write refcount table entry %d: %w", k, err))
		}
	}
	return a.sync()
}

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
		a.batch = min(max(a.batch, n)*2, a.g.batch(maxBatchBytes))
	}
	return nil
}

// reserveRound makes clusters ready, if n are not yet, and says how many; or it fails and has changed nothing.
func (a *allocator) reserveRound(n int64) (int64, error) {
	a.ledger.Lock()
	defer a.ledger.Unlock()
	a.mu.Lock()
	n -= a.ready.clusters()
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
		a.ready.add(r)
	}
	return c.got.clusters(), nil
}

// fetch reads those of the refcount blocks ks that are not in memory, together. Called with ledger held, so that nobody
// changes them meanwhile, but not mu. A few more than rc.limit may be dropped again before they are used.
func (a *allocator) fetch(ks []int64) error {
	type read struct {
		k, off int64
		b      *refBlock
	}
	var reads []read
	a.mu.Lock()
	for _, k := range ks {
		if off, ok := a.rc.absent(k); ok {
			reads = append(reads, read{k: k, off: off})
		}
	}
	a.mu.Unlock()
	err := together(len(reads), func(i int) (err error) {
		reads[i].b, err = a.rc.read(reads[i].k, reads[i].off)
		return err
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range reads {
		if _, ok := a.rc.absent(r.k); ok {
			a.rc.keep(r.k, r.b)
		}
	}
	return nil
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

package qcow2

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// allocator hands out host clusters and takes them back. It reserves them in batches ahead of need (W0): a cluster that it hands
// out is counted, and lies inside the file, durably; it reads as zeros; and nothing references it. What a crash leaves of a
// reservation is leaked, not lost.
//
// With a batch of 16, where 10 and 11 are free and 13 to 40:
//
//	reserve   10, 11, 13 to 26: zeros, counts of 1, the file reaches to 26, sync; ready
//	take(3)   10, 11, 13: a guest's write has them, and its entries point at them with the next commit
//	release   13, when it was discarded and a commit has made that durable: it is punched and counted 0, and the next that is free
//	close     14 to 26 are counted 0, and the file ends behind the last cluster in use
//	a crash   instead leaves counted what no commit has mapped: leaks
type allocator struct {
	f            File
	g            format.Geometry
	sync         func() error // of f; a failure fails the image
	fail         func(error) error
	switchHeader func(change func(*format.Header)) error
	metadata     *metadataMap
	background   *sync.WaitGroup // the image's

	// ledger is held by whoever changes live counts and writes them, for as long as that takes. Taken before mu.
	ledger lock.Mutex[lock.Ledger]
	// growth is held shared by an operation's write, which may lie behind the end of the file, and exclusively by whoever
	// makes the file longer by setting its length: else that could cut off what was written since it looked. Taken after
	// ledger, and before mu.
	growth lock.RWMutex[lock.Growth]

	mu         lock.Mutex[lock.Counts] // guards all below
	rc         *refcounts
	leakSearch *leakSearch    // of a running ReclaimLeaks, nil if there is none: it is told what happens to clusters
	build      nextGeneration // of a running operation, nil if there is none
	// unsafe: refcount blocks whose free clusters are being punched, those before unsafeEnd. Nothing is taken of these.
	unsafe    map[int64]struct{}
	unsafeEnd format.Cluster
	next      format.Cluster // no cluster below is free
	ready     format.Runs    // reserved
	batch     int64          // clusters of the next reservation
	ahead     bool           // a reservation in the background is due or under way
	length    atomic.Int64   // of the file, bytes; changed with mu held
}

// nextGeneration is the metadata's next generation while it is built, as the allocator sees it: it holds free clusters, and
// follows each change of a live count. Its methods are called with the allocator's mu held.
type nextGeneration interface {
	// holds tells that a cluster, which is free in the live generation, is not to be had.
	holds(c format.Cluster) bool
	// mirror makes a change of live counts in the next ones too.
	mirror(r format.Run, delta int) error
	// unmake forgets live refcount block k at off, which the table on disk has never had, with the count of its cluster.
	unmake(k int64, off format.HostOffset)
	// searchFrom is the cluster from which on it takes more.
	searchFrom() format.Cluster
	// ended is closed when the operation has ended.
	ended() <-chan struct{}
}

// newAllocator leaves the functions and the map of metadata to the image.
func newAllocator(f File, g format.Geometry, h *format.Header) (*allocator, error) {
	rc, err := loadRefcounts(f, g, h)
	if err != nil {
		return nil, err
	}
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	a := &allocator{f: f, g: g, rc: rc, next: 1, batch: batch(g, firstBatchBytes)}
	a.length.Store(length)
	return a, nil
}

// fetch reads those of the refcount blocks ks that are not in memory, together. Called with ledger held, so that nobody
// changes them meanwhile, but not mu. A few more than rc.limit may be dropped again before they are used.
func (a *allocator) fetch(ks []int64) error {
	type read struct {
		k   int64
		off format.HostOffset
		b   *refBlock
	}
	var reads []read
	a.mu.Lock()
	for _, k := range ks {
		if off, ok := a.rc.absent(k); ok {
			reads = append(reads, read{k: k, off: off})
		}
	}
	a.mu.Unlock()
	err := host.Together(len(reads), func(i int) (err error) {
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

// fileEnd returns where the file ends.
func (a *allocator) fileEnd() format.HostOffset { return format.HostOffset(a.length.Load()) }

// free tells that no running operation holds a cluster whose count is 0.
func (a *allocator) free(c format.Cluster) bool {
	return a.build == nil || !a.build.holds(c)
}

// add changes live counts, and with them those of a generation that is being built.
func (a *allocator) add(r format.Run, delta int) (zero format.Runs, err error) {
	a.leakSearch.touch(r)
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
func (a *allocator) refuse(r format.Run) error {
	if length := a.fileEnd(); a.g.Offset(r.End()) > 2*length+maxGap {
		return fmt.Errorf("%s: %w: all clusters are in use, up to %d, but the file has only %d bytes", a.f.Name(), ErrCorrupt, r.First, length)
	}
	if err := a.metadata.refuse(r); err != nil {
		return fmt.Errorf("%s: allocate clusters %d to %d: %w", a.f.Name(), r.First, r.End()-1, err)
	}
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

// count returns how often a host cluster is counted.
func (a *allocator) count(cluster format.Cluster) (uint64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, err := a.rc.block(a.g.BlockOf(cluster))
	if err != nil || b == nil {
		return 0, err
	}
	return b.counts.Get(a.g.InBlock(cluster)), nil
}

// searchingLeaks tells whether ReclaimLeaks counts references.
func (a *allocator) searchingLeaks() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.leakSearch != nil
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
func batch(g format.Geometry, bytes int64) int64 {
	return min(max(bytes/g.ClusterSize, 1), maxBatch*bytes/maxBatchBytes)
}

package qcow2

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// generation builds the next generation of the metadata beside the live one (C3). All that it writes goes to
// clusters whose live count is 0 and which the allocator leaves alone; one header write makes it the live
// one. Until then a crash, or abort, leaves the old generation untouched; afterwards what only the old one used is
// punched and free.
//
// Guests may go on meanwhile: every change of a live count is made to both generations, nothing that guests give up
// is released, and L2 tables that they change are written again. See switch.go for the order of it all.
type generation struct {
	img *Image
	g   geometry
	h   header        // the next header, but for what finish places
	row []snapshotRow // the next snapshot table

	// l1 is the next active L1 table where the operation replaces it; else it is what the live one is at the end,
	// the first l1Keep entries of it.
	l1       []l1Entry
	l1Keep   int64
	replaces bool

	cancelled atomic.Pointer[error] // why the build has to end early
	done      chan struct{}         // closed when the operation has ended

	// The allocator's lock guards these.
	blocks map[int64]*shadowBlock // refcount blocks that differ from the live ones
	next   int64                  // search for free clusters from here
	freed  runs                   // clusters whose count fell to 0, and perhaps rose again

	// The image's lock guards these.
	frozen   bool               // what was mapped at the start belongs to a snapshot now, whatever COPIED says
	own      map[int64]struct{} // if frozen: host clusters mapped since
	dirty    map[int64]bool     // L1 indexes of tables that changed after the build saw them
	deferred runs               // given up by guests, durably: released when the operation ends
	deleting string             // ID of the snapshot that must not be opened any more

	// Only the operation's goroutine uses these.
	tables  map[int64]int64 // offset of the next generation's own table, by L1 index
	wrote   runs            // for abort
	pending metaWrite       // neighbours that are written together
}

// shadowBlock is a refcount block of the next generation.
type shadowBlock struct {
	counts counts
	at     int64 // its offset, 0 as long as it has none
	dirty  bool  // changed since it was written
}

// newGeneration starts with what is live. Everything must be committed.
func (img *Image) newGeneration() *generation {
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	img.mu.Lock()
	defer img.mu.Unlock()
	return &generation{
		img: img, g: img.g, h: *img.hdr.Load(), row: append([]snapshotRow(nil), img.rows...), l1Keep: int64(len(img.l1)),
		done: make(chan struct{}), blocks: make(map[int64]*shadowBlock), next: img.alloc.next,
		own: make(map[int64]struct{}), dirty: make(map[int64]bool), tables: make(map[int64]int64),
	}
}

// cancel ends the build early, if it is not too late.
func (n *generation) cancel(why error) { n.cancelled.CompareAndSwap(nil, &why) }

func (n *generation) interrupted() error {
	if p := n.cancelled.Load(); p != nil {
		return *p
	}
	if n.img.closing.Load() {
		return fmt.Errorf("the image is being closed: %w", ErrClosed)
	}
	return n.img.failed()
}

// locked runs fn with the allocator's lock held, in which all counts are looked at and changed.
func (n *generation) locked(fn func() error) error {
	if err := n.interrupted(); err != nil {
		return err
	}
	n.img.alloc.mu.Lock()
	defer n.img.alloc.mu.Unlock()
	return fn()
}

// The following are called with the allocator's lock held.

// block returns the next counts of refcount block i, to read; none if all are 0.
func (n *generation) block(i int64) (counts, error) {
	if b := n.blocks[i]; b != nil {
		return b.counts, nil
	}
	b, err := n.img.alloc.rc.block(i)
	if b == nil {
		return counts{}, err
	}
	return b.counts, nil
}

// ownBlock returns block i to change.
func (n *generation) ownBlock(i int64) (counts, error) {
	if b := n.blocks[i]; b != nil {
		b.dirty = true
		return b.counts, nil
	}
	if i >= maxRefcountTableBytes/8 {
		return counts{}, fmt.Errorf("%w: refcount block %d; the refcount table would exceed %d MiB", ErrLimit, i, maxRefcountTableBytes>>20)
	}
	live, err := n.block(i)
	if err != nil {
		return counts{}, err
	}
	b := &shadowBlock{counts: n.g.newCounts(1), dirty: true}
	copy(b.counts.b, live.b)
	n.blocks[i] = b
	return b.counts, nil
}

// count returns a cluster's next count.
func (n *generation) count(c int64) (uint64, error) {
	b, err := n.block(c >> n.g.blockBits)
	if b.none() {
		return 0, err
	}
	return b.get(c & (n.g.blockCounts - 1)), nil
}

// add changes the next counts of a run.
func (n *generation) add(r run, delta int) error {
	n.img.alloc.search.touch(r)
	return n.g.eachBlock(r, func(k, i, m int64) error {
		b, err := n.ownBlock(k)
		if err != nil {
			return err
		}
		if err := b.add(i, m, delta); err != nil {
			return fmt.Errorf("refcount block %d: %w", k, err)
		}
		for j := i; delta < 0 && j < i+m; j++ {
			if b.get(j) == 0 {
				n.freed.add(run{k<<n.g.blockBits + j, 1})
			}
		}
		return nil
	})
}

// mirror makes a change of live counts in the blocks that are no longer the live ones.
func (n *generation) mirror(r run, delta int) error {
	return n.g.eachBlock(r, func(k, i, m int64) error {
		if n.blocks[k] == nil {
			return nil
		}
		return n.add(run{k<<n.g.blockBits + i, m}, delta)
	})
}

// holds tells that a cluster, which is free in the live generation, is not in this one.
func (n *generation) holds(c int64) bool {
	b := n.blocks[c>>n.g.blockBits]
	return b != nil && b.counts.get(c&(n.g.blockCounts-1)) != 0
}

// take allocates k neighbouring clusters for the next generation.
func (n *generation) take(k int64) (run, error) {
	r := run{first: n.next}
	for r.n < k {
		c, err := n.img.alloc.rc.nextFree(r.end())
		if err != nil {
			return run{}, err
		}
		if n.holds(c) {
			r = run{first: c + 1}
			continue
		}
		if c != r.end() {
			r = run{first: c}
		}
		r.n++
	}
	if err := n.img.alloc.refuse(r); err != nil {
		return run{}, err
	}
	n.next = r.end()
	return r, n.add(r, 1)
}

// place takes clusters for b, has it written and returns its offset.
func (n *generation) place(b []byte) (int64, error) {
	r, err := n.take(max(n.g.clusters(int64(len(b))), 1))
	if err != nil {
		return 0, err
	}
	return r.first << n.g.clusterBits, n.write(r, b)
}

// drop gives up the clusters of a structure of length bytes.
func (n *generation) drop(off, length int64) error {
	return n.add(run{off >> n.g.clusterBits, n.g.clusters(length)}, -1)
}

// unused returns the clusters that no longer have a count.
func (n *generation) unused() runs {
	var rs runs
	for _, r := range n.freed {
		for c := r.first; c < r.end(); c++ {
			if !n.holds(c) {
				rs.add(run{c, 1})
			}
		}
	}
	return rs
}

// maxPending bounds what write gathers, in bytes.
const maxPending = 1 << 20

// write puts b, padded to whole clusters, into clusters of the next generation. Neighbours that come one after the
// other are written together: flush writes the rest. b is copied.
func (n *generation) write(r run, b []byte) error {
	off := r.first << n.g.clusterBits
	if p := &n.pending; off != p.off+int64(len(p.b)) || len(p.b)+len(b) > maxPending {
		if err := n.flush(); err != nil {
			return err
		}
		p.off = off
	}
	n.wrote.add(r)
	n.img.alloc.metadata.put(r, metadataSole) // adopt knows which are L2 tables
	n.pending.b = append(n.pending.b, b...)
	n.pending.b = append(n.pending.b, make([]byte, r.n<<n.g.clusterBits-int64(len(b)))...)
	return nil
}

func (n *generation) flush() error {
	p := &n.pending
	if len(p.b) == 0 {
		return nil
	}
	if _, err := n.img.f.WriteAt(p.b, p.off); err != nil {
		return fmt.Errorf("write metadata: %w", err)
	}
	p.off += int64(len(p.b))
	p.b = p.b[:0]
	return nil
}

// abort gives back what the build has written, and returns why it ended. The live generation is as if it had never
// begun.
func (n *generation) abort(cause error) error {
	n.img.commitMu.Lock()
	defer n.img.commitMu.Unlock()
	n.img.alloc.mu.Lock()
	defer n.img.alloc.mu.Unlock()
	return n.abortLocked(cause)
}

// abortLocked is abort for who holds its locks.
func (n *generation) abortLocked(cause error) error {
	img, a := n.img, n.img.alloc
	a.build = nil
	img.mu.Lock()
	img.build = nil
	img.mu.Unlock()
	cause = fmt.Errorf("%s: %w", img.f.Name(), cause)
	if img.failed() != nil {
		return cause
	}
	if err := a.releaseLocked(n.deferred); err != nil {
		return errors.Join(cause, img.fail(err))
	}
	if len(n.wrote) == 0 {
		return cause
	}
	return errors.Join(cause, a.punch(n.wrote), img.f.Truncate(a.length.Load()))
}

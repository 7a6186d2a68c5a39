package qcow2

import (
	"fmt"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// generation builds the next generation of the metadata beside the live one (C3). All that it writes goes to
// clusters whose live count is 0 and which the allocator leaves alone; one header write makes it the live
// one. Until then a crash, or abort, leaves the old generation untouched; afterwards what only the old one used is
// punched and free.
//
// Guests may go on meanwhile: every change of a live count is made to both generations, nothing that guests give up
// is released, and L2 tables that they change are brought up to date. See operation.go and generation_switch.go for the order
// of it all.
type generation struct {
	img *Image
	g   format.Geometry
	h   format.Header        // the next header, but for what finish places
	row []format.SnapshotRow // the next snapshot table

	// l1 is the next active L1 table where the operation replaces it; else it is what the live one is at the end,
	// the first l1Keep entries of it.
	l1       []format.L1Entry
	l1Keep   int64
	replaces bool

	frees bool       // a guest that meets a full file system waits for the end, rather than end it
	room  format.Run // clusters for this generation alone; see changeInRoom

	cancelled atomic.Pointer[error] // why the build has to end early
	done      chan struct{}         // closed when the operation has ended

	// The allocator's lock guards these. See generation_counts.go.
	blocks  map[int64]*shadowBlock // refcount blocks that were looked at
	loading map[int64]bool         // blocks that are being read; true: a live count in it has changed meanwhile
	next    format.Cluster         // search for free clusters from here
	taken   format.Runs            // clusters that this generation has taken, in ascending order
	ahead   map[format.Cluster]int // live L2 tables, by cluster: references taken away that guests have not given up
	zeroed  map[int64]struct{}     // refcount blocks in which a count fell to 0, and perhaps rose again
	fell1   bool                   // a count fell to 1: COPIED has to be looked at
	slab    []byte                 // memory for more blocks
	spare   []format.Counts        // memory of blocks that were put out of it

	// The image's lock guards these.
	sharesAll bool                        // what was mapped at the start belongs to a snapshot now, whatever COPIED says
	own       map[format.Cluster]struct{} // if sharesAll: host clusters mapped since
	dirty     map[int64]*format.SectorSet // L1 indexes of tables that changed after the build saw them, and what changed there
	deferred  format.Runs                 // given up by guests, durably: abort releases them
	given     int                         // how many of these giveUp has seen
	deleting  string                      // ID of the snapshot that must not be opened any more
	fixed     bool                        // the next generation has its mapping: what guests change now comes after it
	late      []lateTable                 // tables that guests made since then

	// Only the operation's goroutine uses these.
	tables  map[int64]*nextTable        // tables that the next generation has to itself, by L1 index
	copied  map[int64]format.HostOffset // L1 indexes whose entry gains COPIED, and the table's offset
	out     metaWriter
	buffer  []byte            // of the tables that are read
	idle    int64             // guest requests when pace looked last
	paced   int64             // bytes written then
	read    int64             // bytes read since then
	punched int64             // bytes since pacePunch paused
	runs    []format.EntryRun // of the table that is being looked at
}

// nextTable is an L2 table of the next generation that takes the place of an active one.
type nextTable struct {
	at  format.HostOffset
	old format.HostOffset // of the live table whose reference has been taken away for it, 0 if there was none
}

// lateTable is a live table that came into being after the next generation had its mapping.
type lateTable struct {
	index     int64
	old, made format.HostOffset // old is 0 if there was none
}

// newGeneration starts with what is live.
func (img *Image) newGeneration() *generation {
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	img.mu.Lock()
	defer img.mu.Unlock()
	return &generation{
		img: img, g: img.g, h: *img.hdr.Load(), row: append([]format.SnapshotRow(nil), img.rows...), l1Keep: int64(len(img.l1)),
		done: make(chan struct{}), next: img.alloc.next, out: metaWriter{f: img.f, growth: &img.alloc.growth}, idle: img.requests.Load(),
		blocks: make(map[int64]*shadowBlock), loading: make(map[int64]bool), zeroed: make(map[int64]struct{}),
		ahead: make(map[format.Cluster]int), own: make(map[format.Cluster]struct{}), dirty: make(map[int64]*format.SectorSet),
		tables: make(map[int64]*nextTable), copied: make(map[int64]format.HostOffset),
	}
}

func (n *generation) ended() <-chan struct{} { return n.done }

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

// locked runs fn with the allocator's lock held, in which all counts are looked at and changed. Guests' allocations
// wait meanwhile: fn is short, and writes nothing.
func (n *generation) locked(fn func() error) error {
	if err := n.interrupted(); err != nil {
		return err
	}
	n.img.alloc.mu.Lock()
	defer n.img.alloc.mu.Unlock()
	return fn()
}

// waitForSpace is called when a guest's write has met a full disk while n is being built: it returns when a new attempt
// may find space. An operation that frees space is waited for, any other is given up.
func (n *generation) waitForSpace(full error) {
	if !n.frees {
		n.cancel(fmt.Errorf("given up for a guest's write: %w", full))
	}
	<-n.done
}

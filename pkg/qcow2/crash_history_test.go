package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file makes histories to crash: requests of a guest to clusters of every kind, snapshot operations, and what makes
// tables grow.

// crashParams is what a history starts with.
type crashParams struct {
	modelParams
	fullTable bool // the next reservation needs a larger refcount table
}

// crashConfigs are the images that histories start with, in turn.
func crashConfigs() []crashParams {
	image := func(clusterSize int64, bits int, more func(*crashParams)) crashParams {
		p := crashParams{}
		p.ClusterSize, p.Version, p.RefcountBits = clusterSize, 3, bits
		p.size = 24*clusterSize + 3*format.SectorSize
		if more != nil {
			more(&p)
		}
		return p
	}
	compressed := func(p *crashParams) { p.compressed = true }
	zstd := func(p *crashParams) { p.compressed, p.zstd = true, true }
	extended := func(p *crashParams) {
		p.compressed, p.ExtendedL2, p.size = true, true, 13*p.ClusterSize+format.SectorSize
	}
	return []crashParams{
		image(512, 16, func(p *crashParams) { p.size = 140 << 10 }), // more than one refcount block counts
		image(16<<10, 16, extended),
		image(512, 64, compressed),
		image(4096, 16, func(p *crashParams) { p.Version, p.compressed = 2, true }),
		image(512, 2, nil),
		image(16<<10, 32, func(p *crashParams) { extended(p); zstd(p) }),
		image(512, 1, nil),
		image(1024, 16, zstd),
		image(512, 64, func(p *crashParams) { p.fullTable = true; p.size = 2200 << 10 }),
		image(512, 4, nil),
		image(512, 16, func(p *crashParams) { p.Version = 2 }),
		image(512, 8, compressed),
		image(64<<10, 16, func(p *crashParams) { p.size = 7 * 64 << 10 }),
		image(512, 16, func(p *crashParams) { p.size = 4 * 512 }), // a request changes all of its table
		image(512, 32, func(p *crashParams) { p.size = 60 << 10; p.zstd = true; p.compressed = true }),
	}
}

// events names what is special about images that start with p.
func (p crashParams) events() []string {
	es := []string{fmt.Sprintf("refcounts of %d bits", p.RefcountBits), fmt.Sprintf("version %d", p.Version)}
	if p.ExtendedL2 {
		es = append(es, "extended L2")
	}
	if p.compressed {
		es = append(es, map[bool]string{false: "deflate", true: "zstd"}[p.zstd])
	}
	return es
}

const (
	tableGrows = "the refcount table grows"
	l1Grows    = "the L1 table grows"
	leaksFirst = "leaks of an earlier crash"
)

// allEvents are the events that the crash tests must meet.
func allEvents() []string {
	es := []string{"version 2", "version 3", "extended L2", "deflate", "zstd", tableGrows, l1Grows, leaksFirst}
	for order := range 7 {
		es = append(es, fmt.Sprintf("refcounts of %d bits", 1<<order))
	}
	return es
}

// crashHistory makes and records a history.
type crashHistory struct {
	timeline
	t      testing.TB
	rng    *rand.Rand
	g      format.Geometry
	level  int      // 2 for what happens after a crash
	events []string // about all of it
	file   *memFile
	img    *Image
	log    *crashLog
	state  crashState // now, with what is pending
	count  int        // requests so far
	turn   int        // of the guest
	since  touched    // by the guest since its latest flush
	clones []cloneRun
}

// newCrashHistory makes the image that a history starts with. What comes then is recorded.
func newCrashHistory(t testing.TB, seed uint64, p crashParams) *crashHistory {
	t.Helper()
	h := &crashHistory{
		t: t, rng: rand.New(rand.NewPCG(seed, 3)), level: 1, g: p.geometry(), events: p.events(),
		file: newMemFile(fmt.Sprintf("crash-%d", seed)),
	}
	h.state.durable = newSparse()
	if p.compressed {
		h.file, h.state.durable = compressedImage(t, p.modelParams)
	} else {
		must(t, Create(t.Context(), h.file, p.size, p.CreateOptions))
	}
	h.state.durable.size = p.size
	h.log = h.file.record()
	h.open()
	h.dress(0)
	h.create()
	h.dress(1)
	h.flush()
	if p.fullTable {
		h.fillTable()
	}
	h.restart()
	if p.fullTable { // a write to what a snapshot shares takes clusters
		h.create()
		h.write(0, (h.unused()+1)<<h.g.ClusterBits)
	}
	return h
}

// restart begins the history with what is there.
func (h *crashHistory) restart() {
	h.state = h.state.settled()
	h.timeline, h.log, h.since = timeline{first: h.state}, h.file.record(), 0
}

func (h *crashHistory) open() {
	h.t.Helper()
	img, err := Open(h.file.reopen(), OpenOptions{L2CacheSize: 2 * h.g.ClusterSize})
	must(h.t, err)
	h.img = img
}

// fillTable writes until the refcount table has room for little more than one reservation.
func (h *crashHistory) fillTable() {
	h.t.Helper()
	room, step := h.img.alloc.batch-1, int64(64)<<h.g.ClusterBits
	for off := int64(0); h.unused() > room; off += step {
		h.write(off, step)
		must(h.t, h.img.Close()) // the next reservation is small again
		h.open()
	}
}

// unused returns how many clusters that the refcount table has room for are free.
func (h *crashHistory) unused() int64 {
	h.t.Helper()
	free := int64(0)
	for k := range int64(len(h.img.alloc.rc.table)) {
		b, err := h.img.alloc.rc.block(k)
		must(h.t, err)
		for i := range h.g.BlockCounts {
			if b == nil || b.counts.Get(i) == 0 {
				free++
			}
		}
	}
	return free
}

// do makes an operation and notes it. What narrow refcounts refuse changes nothing.
func (h *crashHistory) do(o crashOp, f func() error) {
	h.t.Helper()
	before := *h.img.hdr.Load()
	o.begin = h.file.position()
	err := f()
	h.img.background.Wait()
	o.end = h.file.position()
	switch {
	case h.tooNarrow(err):
		o.what, o.settle, o.change = o.what+": too narrow", false, nil
	case err != nil:
		h.t.Fatalf("%s: %v", o.what, err)
	}
	o.grown(before, h.img)
	h.ops = append(h.ops, o)
	h.state = o.apply(h.state)
}

// tooNarrow tells whether a reference count would not have fit: nothing has changed then.
func (h *crashHistory) tooNarrow(err error) bool {
	return h.g.RefcountOrder < 3 && errors.Is(err, ErrLimit)
}

// grown notes which tables are larger than before.
func (o *crashOp) grown(before format.Header, img *Image) {
	h := img.hdr.Load()
	if h.RefTableClusters > before.RefTableClusters {
		o.events = append(o.events, tableGrows)
	}
	if h.L1Size > before.L1Size {
		o.events = append(o.events, l1Grows)
	}
}

// survey returns the kind of each cluster of the active disk.
func (h *crashHistory) survey() []touched {
	h.t.Helper()
	var all []touched
	must(h.t, h.g.Chunks(0, h.img.Size(), func(c format.Chunk) error {
		es, err := h.img.entries(c)
		for _, e := range es {
			all = append(all, touch(e))
		}
		return err
	}))
	return all
}

// kinds returns the kinds of the clusters of n bytes at off.
func (h *crashHistory) kinds(off, n int64) touched {
	all := touched(0)
	if n > 0 {
		for _, k := range h.survey()[off>>h.g.ClusterBits : (off+n-1)>>h.g.ClusterBits+1] {
			all |= k
		}
	}
	return all
}

// request makes a guest's request to n bytes at off.
func (h *crashHistory) request(kind opKind, off, n int64, data []byte, f func() error) {
	h.t.Helper()
	touches := h.kinds(off, n)
	h.since |= touches
	h.do(crashOp{
		kind: kind, touches: touches, patch: &patch{off, n, data}, what: fmt.Sprintf("%d: %s %#x %#x", h.count, kind, off, n),
	}, f)
}

func (h *crashHistory) write(off, n int64) {
	h.t.Helper()
	h.count++
	p := stamp(h.count, off, n)
	h.request(opWrite, off, n, p, func() error {
		_, err := h.img.WriteAt(p, off)
		return err
	})
}

func (h *crashHistory) zero(off, n int64) {
	h.t.Helper()
	h.count++
	h.request(opZero, off, n, nil, func() error { return h.img.WriteZeroes(off, n) })
}

func (h *crashHistory) discard(off, n int64) {
	h.t.Helper()
	h.count++
	h.request(opDiscard, off, n, nil, func() error { return h.img.Discard(off, n) })
}

// zeroPlain zeroes as QEMU does, where we would unmap.
func (h *crashHistory) zeroPlain(off, n int64) {
	h.t.Helper()
	if h.img.version < 3 {
		h.discard(off, n)
		return
	}
	h.count++
	h.request(opZero, off, n, nil, func() error {
		return h.img.eachToZero(off, n, func(format.L2Entry) format.L2Entry { return format.L2Entry{Sub: format.SubZero} })
	})
}

func (h *crashHistory) flush() {
	h.t.Helper()
	h.do(crashOp{kind: opFlush, what: "flush", settle: true, touches: h.since}, h.img.Flush)
	h.since = 0
}

// dress makes clusters of all kinds, again and again over the disk, in the first or second half of each pattern. Some
// are left as they are: compressed, or what the snapshot has made of them.
func (h *crashHistory) dress(half int64) {
	h.t.Helper()
	const pattern = 12
	c := h.g.ClusterSize
	small := max(format.SectorSize, c/format.Subclusters)
	for first := int64(0); first < min(h.img.Size()>>h.g.ClusterBits, 3*pattern); first += pattern {
		for i := range int64(5) {
			off := (first + half*pattern/2 + i) << h.g.ClusterBits
			if off+c > h.img.Size() {
				return
			}
			switch i {
			case 1:
				h.write(off, c)
			case 2:
				h.discard(off, c)
				h.write(off+min(small, c-small), small)
			case 3:
				h.write(off, c)
				h.zero(off, c)
			case 4:
				h.write(off, c)
				h.zeroPlain(off, c)
			}
		}
	}
}

// guest makes a request in whole sectors: each kind of request to each kind of cluster in turn.
func (h *crashHistory) guest() {
	h.t.Helper()
	off, n := h.target(touched(1) << (h.turn % touchKinds))
	[]func(off, n int64){h.write, h.zero, h.discard}[h.turn/touchKinds%3](off, n)
	h.turn++
}

// target chooses a place, one that begins with a cluster of a kind if there is any.
func (h *crashHistory) target(kind touched) (off, n int64) {
	size, c := h.img.Size(), h.g.ClusterSize
	off = h.rng.Int64N(size/format.SectorSize) * format.SectorSize
	var places []int64
	for i, k := range h.survey() {
		if k == kind {
			places = append(places, int64(i)<<h.g.ClusterBits)
		}
	}
	if len(places) > 0 {
		off = places[h.rng.IntN(len(places))]
		if h.rng.IntN(2) == 0 {
			off = min(off+h.rng.Int64N(c/format.SectorSize)*format.SectorSize, size-format.SectorSize)
		}
	}
	switch h.rng.IntN(4) {
	case 0:
		n = c * (1 + h.rng.Int64N(3))
	case 1:
		n = (1 + h.rng.Int64N(40)) * format.SectorSize
	default:
		n = (1 + h.rng.Int64N(c/format.SectorSize)) * format.SectorSize
	}
	return off, min(n, size-off)
}

// rounds plays the whole history: each operation that is not a guest's once, in an order that depends on turn, with
// guests in between.
func (h *crashHistory) rounds(turn int) {
	h.t.Helper()
	ops := []func(){h.create, h.gotoSnapshot, h.deleteSnapshot, h.renameSnapshot, h.grow, h.clone, h.dropActive, h.reopen}
	for i := range ops {
		ops[(i*3+turn)%len(ops)]()
		h.create()
		h.dress(h.rng.Int64N(2))
		for range 4 { // eight times four: each request to each kind of cluster
			h.guest()
		}
		if h.rng.IntN(3) > 0 {
			h.flush()
		}
		for len(h.state.snaps) > 3 {
			h.deleteSnapshot()
		}
	}
}

// step makes any operation.
func (h *crashHistory) step() {
	h.t.Helper()
	switch n := h.rng.IntN(100); {
	case n < 65:
		h.guest()
	case n < 80:
		h.flush()
	default:
		[]func(){h.create, h.gotoSnapshot, h.deleteSnapshot, h.renameSnapshot, h.grow, h.reopen}[h.rng.IntN(6)]()
	}
}

// whole makes an operation that is about the whole disk, and waits for nobody.
func (h *crashHistory) whole(kind opKind, what string, change func(*crashState), f func() error) {
	h.t.Helper()
	h.do(crashOp{
		kind: kind, what: what, settle: true, change: change, touches: h.kinds(0, h.img.Size()),
	}, f)
	h.since = 0
}

func (h *crashHistory) create() {
	h.t.Helper()
	h.count++
	name := fmt.Sprintf("s%d", h.count)
	h.whole(opCreate, "create "+name, func(s *crashState) {
		s.snaps = append(s.snaps, modelSnapshot{name: name, content: s.durable.clone()})
	}, func() error {
		_, err := h.img.CreateSnapshot(h.t.Context(), name, nil)
		return err
	})
}

// choose picks a snapshot, or makes one first. There is none where refcounts are too narrow.
func (h *crashHistory) choose() (i int, name string, ok bool) {
	h.t.Helper()
	if len(h.state.snaps) == 0 {
		h.create()
	}
	if len(h.state.snaps) == 0 {
		return 0, "", false
	}
	i = h.rng.IntN(len(h.state.snaps))
	return i, h.state.snaps[i].name, true
}

func (h *crashHistory) gotoSnapshot() {
	h.t.Helper()
	if i, name, ok := h.choose(); ok {
		h.whole(opGoto, "goto "+name, func(s *crashState) { s.durable = s.snaps[i].content.clone() },
			func() error { return h.img.GotoSnapshot(h.t.Context(), ByName(name)) })
	}
}

func (h *crashHistory) deleteSnapshot() {
	h.t.Helper()
	if i, name, ok := h.choose(); ok {
		h.whole(opDelete, "delete "+name, func(s *crashState) { s.snaps = slices.Delete(s.snaps, i, i+1) },
			func() error { return h.img.DeleteSnapshot(h.t.Context(), ByName(name)) })
	}
}

func (h *crashHistory) renameSnapshot() {
	h.t.Helper()
	if i, name, ok := h.choose(); ok {
		h.count++
		to := fmt.Sprintf("r%d", h.count)
		h.whole(opRename, "rename "+name+" to "+to, func(s *crashState) { s.snaps[i].name = to },
			func() error { return h.img.RenameSnapshot(h.t.Context(), ByName(name), to) })
	}
}

func (h *crashHistory) grow() {
	h.t.Helper()
	if h.img.version < 3 && len(h.state.snaps) > 0 {
		return
	}
	size := h.img.Size() + h.rng.Int64N(4)*h.g.ClusterSize + h.rng.Int64N(3)*format.SectorSize
	if h.g.ClusterSize == 512 && h.rng.IntN(2) == 0 {
		size += h.g.L2Coverage
	}
	h.whole(opGrow, fmt.Sprintf("grow to %#x", size), func(s *crashState) {
		s.durable = s.durable.clone()
		s.durable.size = size
	}, func() error { return h.img.Resize(h.t.Context(), size) })
}

func (h *crashHistory) dropActive() {
	h.t.Helper()
	h.whole(opDropActive, "drop the active disk", func(s *crashState) {
		size := s.durable.size
		s.durable = newSparse()
		s.durable.size = size
	}, func() error { return h.img.DropActive(h.t.Context()) })
}

func (h *crashHistory) reopen() {
	h.t.Helper()
	h.whole(opOther, "close and open", nil, func() error {
		must(h.t, h.img.Close())
		h.open()
		return nil
	})
}

// end closes the image, which holds exactly what it should then.
func (h *crashHistory) end() {
	h.t.Helper()
	h.close()
	h.closed()
}

func (h *crashHistory) close() {
	h.t.Helper()
	h.whole(opOther, "close", nil, func() error { return h.img.Close() })
}

// closed compares the closed image with what it should hold.
func (h *crashHistory) closed() {
	h.t.Helper()
	img, err := Open(h.file.clone(), OpenOptions{ReadOnly: true})
	must(h.t, err)
	defer img.Close()
	var got observation
	must(h.t, got.observe(img))
	if w := h.state.differs(&got); w != "" {
		h.t.Fatalf("after it was closed: %s\n%s", w, h.history())
	}
}

// cloneRun is a clone: what became of its file, and what it holds at the end.
type cloneRun struct {
	op   crashOp
	log  *crashLog
	want crashState
}

// clone clones the active disk or a snapshot.
func (h *crashHistory) clone() {
	h.t.Helper()
	h.flush()
	v, want, touches := h.img.Active(), h.state.durable, h.kinds(0, h.img.Size())
	if len(h.state.snaps) > 0 && h.rng.IntN(3) == 0 {
		i, name, _ := h.choose()
		var err error
		v, err = h.img.OpenSnapshot(ByName(name))
		must(h.t, err)
		want, touches = h.state.snaps[i].content, touchUnallocated
	}
	dst := newMemFile(h.file.name + "-clone")
	log := dst.record()
	must(h.t, Clone(h.t.Context(), dst, v, 0, nil))
	if v.row != nil {
		must(h.t, v.Close())
	}
	h.clones = append(h.clones, cloneRun{
		op: crashOp{kind: opClone, what: "clone", touches: touches, end: dst.position()}, log: log, want: crashState{durable: want.clone()},
	})
}

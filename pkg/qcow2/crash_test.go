package qcow2

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// This file crashes images at every moment of random histories (C1, C2): each state that a crash may leave is
// checked, opened and compared with what was promised; some are written on, by us and by QEMU.

var crashHistories = flag.Int("crash-histories", 10, "random histories for TestCrash")

// crashState is what an image may be after a crash.
type crashState struct {
	snaps   []modelSnapshot
	durable *sparse // the active disk, as far as it was promised
	pending []patch // guest writes that may be there or not, each sector by itself, the latest of them last
}

// patch is a guest write; without data, of zeros.
type patch struct {
	off, n int64
	data   []byte
}

func (p patch) apply(s *sparse) {
	if p.data == nil {
		s.zero(p.off, p.n)
	} else {
		s.writeAt(p.data, p.off)
	}
}

// settle makes everything pending durable.
func (s *crashState) settle() {
	s.durable = s.durable.clone()
	for _, p := range s.pending {
		p.apply(s.durable)
	}
	s.pending = nil
}

// crashOp is one operation of a history: which calls of the file it made, and what it does to the state: a patch, or
// all pending becomes durable and then change.
type crashOp struct {
	what       string
	begin, end int
	patch      *patch
	change     func(*crashState)
}

func (o *crashOp) apply(s crashState) crashState {
	s.snaps, s.pending = slices.Clone(s.snaps), slices.Clone(s.pending)
	if o.patch != nil {
		s.pending = append(s.pending, *o.patch)
		return s
	}
	s.settle()
	if o.change != nil {
		o.change(&s)
	}
	return s
}

// crashHistory makes and records a history.
type crashHistory struct {
	t     testing.TB
	rng   *rand.Rand
	g     geometry
	file  *memFile
	img   *Image
	log   *crashLog
	ops   []crashOp
	first crashState
	state crashState // after all ops, nothing pending
	count int
	most  int64 // sectors of a large request
}

func newCrashHistory(t testing.TB, seed uint64) *crashHistory {
	rng := rand.New(rand.NewPCG(seed, 3))
	h := &crashHistory{t: t, rng: rng, file: newMemFile(fmt.Sprintf("crash-%d", seed))}
	p := modelParams{zstd: rng.IntN(2) == 0, compressed: rng.IntN(3) == 0}
	p.ClusterSize = int64([]int{512, 512, 1024, 4096, 65536}[rng.IntN(5)])
	p.Version, p.RefcountBits = 3-rng.IntN(4)/3, 16
	p.zstd = p.zstd && p.Version == 3
	p.ExtendedL2 = p.Version == 3 && p.ClusterSize >= 16<<10
	h.g = p.geometry()
	p.size = max(40<<10, 6*p.ClusterSize)
	if p.ClusterSize == 512 && rng.IntN(2) == 0 {
		p.size, h.most = 400<<10, 300 // more than one refcount block counts
	}
	h.state.durable = newSparse()
	if p.compressed {
		h.file, h.state.durable = compressedImage(t, p)
	} else {
		must(t, Create(h.file, p.size, p.CreateOptions))
	}
	h.state.durable.size = p.size
	h.open()
	h.log = h.file.record()
	h.ops = nil
	for range 4 { // something to start from
		h.guest()
	}
	h.snapshotOp()
	must(t, h.img.Flush())
	h.state.settle()
	h.first, h.ops, h.log = h.state, nil, h.file.record()
	return h
}

func (h *crashHistory) open() {
	h.t.Helper()
	img, err := Open(h.file.reopen(), OpenOptions{L2CacheSize: 2 * h.g.clusterSize})
	must(h.t, err)
	h.img = img
}

// do makes an operation and notes it.
func (h *crashHistory) do(o crashOp, f func() error) {
	h.t.Helper()
	o.begin = h.file.position()
	if err := f(); err != nil {
		h.t.Fatalf("%s: %v", o.what, err)
	}
	o.end = h.file.position()
	h.ops = append(h.ops, o)
	h.state = o.apply(h.state)
}

func (h *crashHistory) step() {
	h.t.Helper()
	switch n := h.rng.IntN(100); {
	case n < 55:
		h.guest()
	case n < 70:
		h.do(crashOp{what: "flush"}, h.img.Flush)
	default:
		h.snapshotOp()
	}
}

// guest makes a request in whole sectors.
func (h *crashHistory) guest() {
	h.t.Helper()
	h.count++
	size := h.state.durable.size
	perCluster := h.g.clusterSize / sectorSize
	off := h.rng.Int64N(size/sectorSize) * sectorSize
	if h.rng.IntN(2) == 0 {
		off &^= h.g.clusterSize - 1
	}
	n := (1 + h.rng.Int64N(min(3*perCluster, 40))) * sectorSize
	if h.rng.IntN(3) == 0 {
		n = h.g.clusterSize * (1 + h.rng.Int64N(3))
	}
	if h.most > 0 && h.rng.IntN(4) == 0 {
		n = (1 + h.rng.Int64N(h.most)) * sectorSize
	}
	n = min(n, size-off)
	switch h.rng.IntN(5) {
	default:
		p := stamp(h.count, off, n)
		h.do(crashOp{what: fmt.Sprintf("%d: write %#x %#x", h.count, off, n), patch: &patch{off, n, p}}, func() error {
			_, err := h.img.WriteAt(p, off)
			return err
		})
	case 0:
		h.do(crashOp{what: fmt.Sprintf("%d: zero %#x %#x", h.count, off, n), patch: &patch{off, n, nil}}, func() error {
			return h.img.WriteZeroes(off, n)
		})
	case 1:
		h.do(crashOp{what: fmt.Sprintf("%d: discard %#x %#x", h.count, off, n), patch: &patch{off, n, nil}}, func() error {
			return h.img.Discard(off, n)
		})
	}
}

// snapshotOp makes an operation that changes the generation, or opens the image anew.
func (h *crashHistory) snapshotOp() {
	h.t.Helper()
	h.count++
	snaps := len(h.state.snaps)
	kind := h.rng.IntN(5)
	if snaps == 0 || kind == 0 && snaps < 4 {
		name := fmt.Sprintf("s%d", h.count)
		h.do(crashOp{what: "snapshot " + name, change: func(s *crashState) {
			s.snaps = append(s.snaps, modelSnapshot{name: name, content: s.durable.clone()})
		}}, func() error {
			_, err := h.img.CreateSnapshot(name, nil)
			return err
		})
		return
	}
	i := h.rng.IntN(snaps)
	name := h.state.snaps[i].name
	switch kind {
	case 1:
		h.do(crashOp{what: "goto " + name, change: func(s *crashState) { s.durable = s.snaps[i].content.clone() }},
			func() error { return h.img.GotoSnapshot(ByName(name)) })
	case 2, 0:
		h.do(crashOp{what: "delete " + name, change: func(s *crashState) { s.snaps = slices.Delete(s.snaps, i, i+1) }},
			func() error { return h.img.DeleteSnapshot(ByName(name)) })
	case 3:
		size := h.state.durable.size + h.rng.Int64N(4)*h.g.clusterSize + h.rng.Int64N(3)*sectorSize
		if h.img.version < 3 {
			return
		}
		h.do(crashOp{what: fmt.Sprintf("resize %#x", size), change: func(s *crashState) {
			s.durable = s.durable.clone()
			s.durable.size = size
		}}, func() error { return h.img.Resize(size) })
	case 4:
		h.do(crashOp{what: "reopen"}, func() error {
			must(h.t, h.img.Close())
			h.open()
			return nil
		})
	}
}

// verifier walks through the crashes of a history in order.
type verifier struct {
	h     *crashHistory
	state crashState // after the ops that had ended
	next  int        // the first op that had not
	tried int
}

func (h *crashHistory) history() string {
	var b strings.Builder
	for _, o := range h.ops {
		fmt.Fprintf(&b, "%d-%d %s\n", o.begin, o.end, o.what)
	}
	return b.String()
}

// verify checks one crash and returns the open image and what it holds.
func (v *verifier) verify(t *testing.T, c crash) {
	t.Helper()
	v.tried++
	for v.next < len(v.h.ops) && v.h.ops[v.next].end <= c.calls {
		v.state = v.h.ops[v.next].apply(v.state)
		v.next++
	}
	allowed := []crashState{v.state}
	if v.next < len(v.h.ops) && v.h.ops[v.next].begin < c.calls {
		allowed = append(allowed, v.h.ops[v.next].apply(v.state))
	}
	fail := func(format string, args ...any) {
		t.Helper()
		path := tempImage(t)
		c.file.save(t, path)
		t.Fatalf("crash after %d calls (torn: %t; last: %s): %s\nqemu-img check: %s\n%s", c.calls, c.torn,
			v.h.log.calls[max(0, c.calls-1)], fmt.Sprintf(format, args...), runQemuCheck(t, path).output, v.h.history())
	}
	if r, err := checkFile(t.Context(), c.file); err != nil || r.Corruptions != 0 {
		fail("our check: %+v, %v", r, err)
	}
	img, err := Open(c.file, OpenOptions{})
	if err != nil {
		fail("%v", err)
	}
	var wrong []string
	for _, s := range allowed {
		if w := s.compare(img); w != "" {
			wrong = append(wrong, w)
		}
	}
	if len(wrong) == len(allowed) {
		fail("the content is none of those allowed: %q", wrong)
	}
	must(t, img.Close())
}

// compare says how the image differs from the state, "" if it does not.
func (s *crashState) compare(img *Image) string {
	snapshots := img.Snapshots()
	if len(snapshots) != len(s.snaps) {
		return fmt.Sprintf("%d snapshots, not %d", len(snapshots), len(s.snaps))
	}
	for i, want := range s.snaps {
		if snapshots[i].Name != want.name {
			return fmt.Sprintf("snapshot %q, not %q", snapshots[i].Name, want.name)
		}
		if w := compareSnapshot(img, want); w != "" {
			return w
		}
	}
	if img.Size() != s.durable.size {
		return fmt.Sprintf("a disk of %d bytes, not %d", img.Size(), s.durable.size)
	}
	got, want := make([]byte, img.Size()), make([]byte, img.Size())
	if _, err := img.ReadAt(got, 0); err != nil {
		return err.Error()
	}
	s.durable.readAt(want, 0)
	for at := int64(0); at < img.Size(); at += sectorSize {
		if sector := got[at : at+sectorSize]; !bytes.Equal(sector, want[at:at+sectorSize]) && !s.mayHold(at, sector) {
			return fmt.Sprintf("the active disk is wrong at %#x", at)
		}
	}
	return ""
}

func compareSnapshot(img *Image, want modelSnapshot) string {
	v, err := img.OpenSnapshot(ByName(want.name))
	if err != nil {
		return err.Error()
	}
	defer v.Close()
	if v.Size() != want.content.size {
		return fmt.Sprintf("snapshot %q has %d bytes, not %d", want.name, v.Size(), want.content.size)
	}
	got, expected := make([]byte, v.Size()), make([]byte, v.Size())
	if _, err := v.ReadAt(got, 0); err != nil {
		return err.Error()
	}
	want.content.readAt(expected, 0)
	if i := difference(got, expected); i >= 0 {
		return fmt.Sprintf("snapshot %q is wrong at %#x", want.name, i)
	}
	return ""
}

// mayHold tells whether a pending write wrote such a sector.
func (s *crashState) mayHold(at int64, sector []byte) bool {
	for _, p := range s.pending {
		if at < p.off || at >= p.off+p.n {
			continue
		}
		if p.data == nil && isZero(sector) ||
			p.data != nil && bytes.Equal(sector, p.data[at-p.off:at-p.off+sectorSize]) {
			return true
		}
	}
	return false
}

func TestCrash(t *testing.T) {
	for seed := range uint64(*crashHistories) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			h := newCrashHistory(t, seed)
			for range 25 {
				h.step()
			}
			must(t, h.img.Close())
			h.ops = append(h.ops, crashOp{what: "close", begin: len(h.log.calls), end: len(h.log.calls)})
			h.crash(t)
		})
	}
}

// crash tries the crashes of a history.
func (h *crashHistory) crash(t *testing.T) {
	v := &verifier{h: h, state: h.first}
	rng := h.rng
	for c := range h.log.crashes(rng, func(_ int, synced bool) int {
		if !synced && rng.IntN(3) > 0 {
			return -1
		}
		return 1 + rng.IntN(2)
	}) {
		forQEMU := c.file.clone()
		goOn := c.file.clone()
		v.verify(t, c)
		if rng.IntN(250) == 0 {
			path := tempImage(t)
			forQEMU.save(t, path)
			if r := runQemuCheck(t, path); r.exit != 0 && r.exit != 3 {
				t.Fatalf("crash after %d calls (torn: %t): qemu-img check: %s\n%s", c.calls, c.torn, r.output, v.h.history())
			}
		}
		switch rng.IntN(120) {
		case 0, 1, 2, 3:
			h.goOn(t, goOn, c)
		case 4:
			h.goOnQEMU(t, goOn, c)
		}
	}
	t.Logf("%d operations, %d calls, %d states", len(h.ops), len(h.log.calls), v.tried)
}

// contents reads all snapshots.
func contents(t *testing.T, img *Image) []modelSnapshot {
	t.Helper()
	var all []modelSnapshot
	for _, s := range img.Snapshots() {
		v, err := img.OpenSnapshot(ByName(s.Name))
		must(t, err)
		b := make([]byte, v.Size())
		_, err = v.ReadAt(b, 0)
		must(t, err)
		must(t, v.Close())
		content := newSparse()
		content.writeAt(b, 0)
		all = append(all, modelSnapshot{name: s.Name, content: content})
	}
	return all
}

// goOn writes to a crashed image: no snapshot may change by it, and the active disk only where it was written.
func (h *crashHistory) goOn(t *testing.T, f *memFile, c crash) {
	t.Helper()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	before := crashState{snaps: contents(t, img), durable: newSparse()}
	active := make([]byte, img.Size())
	_, err = img.ReadAt(active, 0)
	must(t, err)
	before.durable.writeAt(active, 0)
	for i := range 12 {
		p := patch{off: h.rng.Int64N(img.Size()/sectorSize) * sectorSize}
		p.n = min(img.Size()-p.off, (1+h.rng.Int64N(8))*sectorSize)
		switch h.rng.IntN(4) {
		case 0:
			must(t, img.Discard(p.off, p.n))
			p.apply(before.durable)
		case 1:
			must(t, img.Flush())
		default:
			p.data = stamp(1000+i, p.off, p.n)
			_, err := img.WriteAt(p.data, p.off)
			must(t, err)
			p.apply(before.durable)
		}
	}
	if w := before.compare(img); w != "" {
		t.Fatalf("crash after %d calls (torn: %t), then writes: %s\n%s", c.calls, c.torn, w, h.history())
	}
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.Corruptions != 0 {
		t.Fatalf("crash after %d calls (torn: %t), then writes: our check: %+v, %v", c.calls, c.torn, r, err)
	}
}

// goOnQEMU lets QEMU write to a crashed image.
func (h *crashHistory) goOnQEMU(t *testing.T, f *memFile, c crash) {
	t.Helper()
	img, err := Open(f, OpenOptions{ReadOnly: true})
	must(t, err)
	before := contents(t, img)
	size := img.Size()
	must(t, img.Close())
	path := tempImage(t)
	f.save(t, path)
	var commands []string
	for range 8 {
		off := h.rng.Int64N(size/sectorSize) * sectorSize
		n := min(size-off, (1+h.rng.Int64N(8))*sectorSize)
		commands = append(commands, fmt.Sprintf("%s %d %d", []string{"write -P 9", "write -z", "discard"}[h.rng.IntN(3)], off, n))
	}
	qemuIO(t, path, commands...)
	if r := runQemuCheck(t, path); r.exit != 0 && r.exit != 3 {
		t.Fatalf("crash after %d calls (torn: %t), then QEMU %q: %s", c.calls, c.torn, commands, r.output)
	}
	img, err = Open(loadMemFile(t, path), OpenOptions{})
	must(t, err)
	defer img.Close()
	for _, s := range before {
		if w := compareSnapshot(img, s); w != "" {
			t.Fatalf("crash after %d calls (torn: %t), then QEMU %q: %s", c.calls, c.torn, commands, w)
		}
	}
}

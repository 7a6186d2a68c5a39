package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"golang.org/x/sys/unix"
)

// This file runs random histories of operations on an image and on a model of it, a sparse array of
// bytes per state, and compares them at the end: what we read, what QEMU reads, and both checkers.

var (
	histories = flag.Int("histories", 200, "random histories for TestModel")
	firstSeed = flag.Int("first-seed", 0, "seed of the first random history")
)

// model is what an image ought to be.
type model struct {
	active *sparse // its size is the disk's
	snaps  []modelSnapshot
}

type modelSnapshot struct {
	name, id string
	content  *sparse
}

// modelParams is what a history starts with.
type modelParams struct {
	CreateOptions
	size       int64
	ops        int
	most       int64 // bytes of a large request
	compressed bool  // QEMU makes the image, of compressed clusters
	zstd       bool
}

func randomParams(rng *rand.Rand) modelParams {
	p := modelParams{ops: 30 + rng.IntN(50)}
	p.ClusterSize, p.Version, p.RefcountBits = 512<<rng.IntN(8), 3-rng.IntN(4)/3, 16
	if rng.IntN(7) == 0 { // large clusters cost time
		p.ClusterSize <<= 5
	}
	if p.Version == 3 {
		p.RefcountBits = []int{16, 16, 16, 1, 2, 4, 8, 32, 64}[rng.IntN(9)]
		p.ExtendedL2 = p.ClusterSize >= 16<<10 && rng.IntN(3) == 0
		p.zstd = rng.IntN(2) == 0
	}
	p.compressed = p.RefcountBits >= 16 && rng.IntN(4) == 0
	c, g := p.ClusterSize, p.geometry()
	p.most = 4 * c
	switch {
	case c > 64<<10:
		p.ops /= 2
		p.size = max(12*c, 2<<20)
	case rng.IntN(8) == 0 && !p.compressed: // a second L2 table, far away with large clusters
		p.size = g.L2Coverage + 20*c
	case c <= 1024 && rng.IntN(4) == 0: // many refcount blocks, sometimes a larger refcount table
		p.size = []int64{10 << 20, 1 << 20, 1 << 20}[rng.IntN(3)]
		p.most = p.size / 20
	default:
		p.size = 64 * c
		p.most = 40 * min(c, 4096)
	}
	p.size += rng.Int64N(3 * c)
	return p
}

func (p modelParams) geometry() format.Geometry {
	return format.NewGeometry(uint(log2(p.ClusterSize)), uint(log2(int64(p.RefcountBits))), p.ExtendedL2)
}

func log2(n int64) int {
	i := 0
	for ; n > 1; n >>= 1 {
		i++
	}
	return i
}

// history plays one.
type history struct {
	t     testing.TB
	rng   *rand.Rand
	g     format.Geometry
	p     modelParams
	file  *memFile
	img   *Image
	model model
	last  int64    // where the latest request was
	count int      // requests so far; stamps what they write
	log   []string // for whoever must replay it
}

func newHistory(t testing.TB, seed uint64) *history {
	rng := rand.New(rand.NewPCG(seed, 0))
	p := randomParams(rng)
	h := &history{t: t, rng: rng, p: p, file: newMemFile(fmt.Sprintf("seed-%d", seed)), g: p.geometry()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d, %+v:\n%s", seed, p, strings.Join(h.log, "\n"))
		}
	})
	h.model.active = newSparse()
	if p.compressed {
		h.file, h.model.active = compressedImage(t, p)
	} else {
		must(t, Create(t.Context(), h.file, p.size, p.CreateOptions))
	}
	h.model.active.size = wholeSectors(p.size)
	h.open()
	return h
}

// compressedImage lets qemu-img compress a disk that compresses well and begins and ends with data.
func compressedImage(t testing.TB, p modelParams) (*memFile, *sparse) {
	t.Helper()
	content := newSparse()
	size := wholeSectors(p.size)
	for off := int64(0); off < size; off += 3 * p.ClusterSize {
		n := min(size-off, 2*p.ClusterSize)
		content.writeAt(bytes.Repeat([]byte{byte(off/p.ClusterSize) | 1, 2, 3}, int(n)/3+1)[:n], off)
	}
	content.size = size
	raw, path := filepath.Join(t.TempDir(), "raw"), tempImage(t)
	(&memFile{content: content}).save(t, raw)
	options := fmt.Sprintf("cluster_size=%d,refcount_bits=%d,compat=%s", p.ClusterSize, p.RefcountBits, map[int]string{2: "0.10", 3: "1.1"}[p.Version])
	if p.ExtendedL2 {
		options += ",extended_l2=on"
	}
	if p.zstd {
		options += ",compression_type=zstd"
	}
	qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
	return loadMemFile(t, path), content
}

func (h *history) open() {
	h.t.Helper()
	// A tiny cache: tables are written back and read again.
	img, err := Open(h.file.reopen(), OpenOptions{L2CacheSize: 2 * h.p.ClusterSize})
	must(h.t, err)
	h.img = img
}

// wholeSectors is what a disk of size bytes becomes.
func wholeSectors(size int64) int64 { return (size + format.SectorSize - 1) &^ (format.SectorSize - 1) }

// play makes the history's requests.
func (h *history) play() {
	h.t.Helper()
	for range h.p.ops {
		h.step()
	}
}

func (h *history) note(text string, args ...any) {
	h.log = append(h.log, fmt.Sprintf(text, args...))
}

func (h *history) step() {
	h.t.Helper()
	h.count++
	switch n := h.rng.IntN(100); {
	case n < 42:
		h.write()
	case n < 52:
		h.zero("zero", h.img.WriteZeroes)
	case n < 63:
		h.zero("discard", h.img.Discard)
	case n < 70:
		h.note("flush")
		must(h.t, h.img.Flush())
	case n < 76:
		off, n := h.span()
		h.compare("read", h.img.ReadAt, h.model.active, off, n)
	case n < 84:
		h.createSnapshot()
	case n < 89:
		h.gotoSnapshot()
	case n < 94:
		h.deleteSnapshot()
	case n < 97:
		h.resize()
	default:
		h.reopen()
	}
}

// span chooses a request: near borders, near the one before, of all lengths.
func (h *history) span() (off, n int64) {
	size := h.model.active.size
	if size == 0 {
		return 0, 0
	}
	c := h.g.ClusterSize
	switch h.rng.IntN(6) {
	case 0:
		off = h.last
	case 1:
		off = h.last &^ (c - 1)
	case 2:
		off = h.g.L2Coverage * h.rng.Int64N(size/h.g.L2Coverage+1)
	case 3:
		off = size - c
	default:
		off = h.rng.Int64N(min(size, 40*c)) &^ (c - 1)
	}
	off += [...]int64{0, 0, 0, 1, -1, 511, 512, -512, c / 2, c, -c}[h.rng.IntN(11)]
	off = max(0, min(off, size-1))
	n = [...]int64{1, 7, 512, 513, 4096, c - 1, c, c, c + 1, 2 * c, 3*c + 5}[h.rng.IntN(11)]
	if n > 256<<10 && h.rng.IntN(8) != 0 {
		n = 1 + h.rng.Int64N(8<<10)
	}
	if h.rng.IntN(6) == 0 {
		n = 1 + h.rng.Int64N(h.p.most)
	}
	h.last = off
	return off, min(n, size-off)
}

func (h *history) write() {
	h.t.Helper()
	off, n := h.span()
	h.note("%d: write %#x %#x", h.count, off, n)
	p := stamp(h.count, off, n)
	got, err := h.img.WriteAt(p, off)
	if err != nil || int64(got) != n {
		h.t.Fatalf("write of %d bytes at %#x: %d, %v", n, off, got, err)
	}
	h.model.active.writeAt(p, off)
}

// stamp returns n bytes, none of them zero, that tell which request wrote them and where.
func stamp(count int, off, n int64) []byte {
	p := make([]byte, n)
	for done := int64(0); done < n; { // sector by sector: a loop over bytes is slow under -race
		at := off + done
		sector := stampSector(count, at/format.SectorSize)
		done += int64(copy(p[done:], sector[at%format.SectorSize:]))
	}
	return p
}

func stampSector(count int, sector int64) []byte {
	var word [8]byte
	binary.LittleEndian.PutUint64(word[:], uint64(count)*0x9e3779b97f4a7c15^uint64(sector)*0xd6e8feb86659fd93|0x0101010101010101)
	return bytes.Repeat(word[:], format.SectorSize/len(word))
}

func (h *history) zero(what string, do func(off, n int64) error) {
	h.t.Helper()
	off, n := h.span()
	if h.rng.IntN(3) == 0 { // more than one table
		n = min(h.model.active.size-off, h.g.L2Coverage+h.rng.Int64N(h.g.L2Coverage))
	}
	h.note("%d: %s %#x %#x", h.count, what, off, n)
	must(h.t, do(off, n))
	h.model.active.zero(off, n)
}

func (h *history) createSnapshot() {
	h.t.Helper()
	name := fmt.Sprintf("s%d", h.count)
	if len(h.model.snaps) > 5 {
		h.deleteSnapshot()
	}
	h.note("%d: snapshot %s", h.count, name)
	cuts := 0
	s, err := h.img.CreateSnapshot(h.t.Context(), name, func(Snapshot) { cuts++ })
	if h.tooNarrow(err) {
		return
	}
	must(h.t, err)
	if cuts != 1 || s.Name != name || s.DiskSize != h.model.active.size {
		h.t.Fatalf("%d cuts, snapshot %+v", cuts, s)
	}
	h.model.snaps = append(h.model.snaps, modelSnapshot{name, s.ID, h.model.active.clone()})
	if _, err := h.img.CreateSnapshot(h.t.Context(), name, nil); !errors.Is(err, ErrExists) {
		h.t.Fatalf("the same name again: %v", err)
	}
}

// tooNarrow tells whether a refcount would not have fit: nothing has changed then.
func (h *history) tooNarrow(err error) bool {
	return h.p.RefcountBits < 8 && errors.Is(err, ErrLimit)
}

// choose picks a snapshot and one of the ways to name it.
func (h *history) choose() (int, Selector) {
	if len(h.model.snaps) == 0 {
		return -1, Selector{}
	}
	i := h.rng.IntN(len(h.model.snaps))
	s := h.model.snaps[i]
	return i, [...]Selector{ByName(s.name), ByID(s.id), ByIDAndName(s.id, s.name), ByIDOrName(s.name), ByIDOrName(s.id)}[h.rng.IntN(5)]
}

func (h *history) gotoSnapshot() {
	h.t.Helper()
	i, selector := h.choose()
	if i < 0 {
		return
	}
	h.note("%d: goto %s", h.count, selector)
	err := h.img.GotoSnapshot(h.t.Context(), selector)
	if h.tooNarrow(err) {
		return
	}
	must(h.t, err)
	h.model.active = h.model.snaps[i].content.clone()
}

func (h *history) deleteSnapshot() {
	h.t.Helper()
	i, selector := h.choose()
	if i < 0 {
		return
	}
	h.note("%d: delete %s", h.count, selector)
	must(h.t, h.img.DeleteSnapshot(h.t.Context(), selector))
	h.model.snaps = slices.Delete(h.model.snaps, i, i+1)
	if err := h.img.DeleteSnapshot(h.t.Context(), selector); !errors.Is(err, ErrNotFound) {
		h.t.Fatalf("delete it again: %v", err)
	}
}

func (h *history) resize() {
	h.t.Helper()
	size := h.model.active.size + [...]int64{0, 1, 512, h.g.ClusterSize, 5*h.g.ClusterSize + 7, h.g.L2Coverage}[h.rng.IntN(6)]
	if size > 1<<30 {
		return
	}
	h.note("%d: resize %#x", h.count, size)
	err := h.img.Resize(h.t.Context(), size)
	if h.p.Version == 2 && len(h.model.snaps) > 0 {
		if !errors.Is(err, ErrUnsupported) {
			h.t.Fatalf("resize of a version 2 image with snapshots: %v", err)
		}
		return
	}
	must(h.t, err)
	h.model.active.size = wholeSectors(size)
}

func (h *history) reopen() {
	h.t.Helper()
	h.note("%d: reopen", h.count)
	must(h.t, h.img.Close())
	h.cleanCheck()
	h.open()
	if h.rng.IntN(4) == 0 {
		h.verify()
	}
}

// cleanCheck demands that the closed image has neither corruptions nor leaks.
func (h *history) cleanCheck() {
	h.t.Helper()
	if r, err := checkFile(h.t.Context(), h.file.clone()); err != nil || r.ExitStatus() != 0 {
		h.t.Fatalf("our check: %+v, %v", r, err)
	}
}

func (h *history) compare(what string, read func([]byte, int64) (int, error), want *sparse, off, n int64) {
	h.t.Helper()
	got, expected := make([]byte, n), make([]byte, n)
	if m, err := read(got, off); err != nil || int64(m) != n {
		h.t.Fatalf("%s of %d bytes at %#x: %d, %v", what, n, off, m, err)
	}
	want.readAt(expected, off)
	if i := difference(got, expected); i >= 0 {
		h.t.Fatalf("%s of %d bytes at %#x: %#x is %#x, want %#x", what, n, off, off+int64(i), got[i], expected[i])
	}
}

// difference returns the index of the first byte that differs, -1 if none does.
func difference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// verify compares everything that can be read with the model.
func (h *history) verify() {
	h.t.Helper()
	if got := h.img.Size(); got != h.model.active.size {
		h.t.Fatalf("the disk has %d bytes, want %d", got, h.model.active.size)
	}
	h.verifyView("the active disk", h.img.Active(), h.model.active)
	snapshots := h.img.Snapshots()
	if len(snapshots) != len(h.model.snaps) {
		h.t.Fatalf("%d snapshots, want %d", len(snapshots), len(h.model.snaps))
	}
	for i, s := range h.model.snaps {
		if snapshots[i].Name != s.name || snapshots[i].ID != s.id {
			h.t.Fatalf("snapshot %d is %+v, want %+v", i, snapshots[i], s)
		}
		v, err := h.img.OpenSnapshot(ByName(s.name))
		must(h.t, err)
		h.verifyView("snapshot "+s.name, v, s.content)
		must(h.t, v.Close())
	}
}

// verifyView compares all of a disk: what its extents call data byte by byte, and that the model has none elsewhere.
func (h *history) verifyView(what string, v *View, want *sparse) {
	h.t.Helper()
	if v.Size() != want.size {
		h.t.Fatalf("%s has %d bytes, want %d", what, v.Size(), want.size)
	}
	nonzero := want.nonzero()
	at := int64(0)
	must(h.t, v.Extents(0, func(e Extent) error {
		if e.Offset != at || e.Length <= 0 {
			h.t.Fatalf("%s: extent %+v, want one at %#x", what, e, at)
		}
		at += e.Length
		if e.Kind != Data && e.Kind != Compressed {
			for _, off := range nonzero {
				if off >= e.Offset && off < at {
					h.t.Fatalf("%s: %s extent %#x+%#x, but there is data at %#x", what, e.Kind, e.Offset, e.Length, off)
				}
			}
			return nil
		}
		for off := e.Offset; off < at; off += 1 << 20 {
			h.compare(what, v.ReadAt, want, off, min(at-off, 1<<20))
		}
		return nil
	}))
	if at != want.size {
		h.t.Fatalf("%s: the extents end at %#x of %#x", what, at, want.size)
	}
	if want.size <= 4<<20 {
		h.compare(what, v.ReadAt, want, 0, want.size)
	}
}

// nonzero returns the offset of the first byte that is not zero of each page that has one.
func (s *sparse) nonzero() []int64 {
	var offs []int64
	for _, page := range slices.Sorted(maps.Keys(s.pages)) {
		if !isZero(s.pages[page][:]) {
			i := slices.IndexFunc(s.pages[page][:], func(b byte) bool { return b != 0 })
			offs = append(offs, page*memPageSize+int64(i))
		}
	}
	return offs
}

// verifyQEMU lets QEMU check the closed image and read all of its states.
func (h *history) verifyQEMU() {
	h.t.Helper()
	path := tempImage(h.t)
	h.file.save(h.t, path)
	if c := runQemuCheck(h.t, path); c.exit != 0 {
		h.t.Fatalf("qemu-img check: %s", c.output)
	}
	qemuReads(h.t, path, "", h.model.active, h.model.active.size)
	for _, s := range h.model.snaps {
		qemuReads(h.t, path, s.name, s.content, h.model.active.size)
	}
}

// qemuReads compares what qemu-img converts to raw with want. QEMU exports a snapshot with the size of the active disk.
func qemuReads(t testing.TB, path, snapshot string, want *sparse, activeSize int64) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	args := []string{"convert", "-f", "qcow2", "-O", "raw"}
	if snapshot != "" {
		args = append(args, "-l", "snapshot.name="+snapshot)
	}
	qemuImg(t, append(args, path, raw)...)
	got := loadSparse(t, raw)
	if got.size != activeSize {
		t.Fatalf("QEMU reads %d bytes of snapshot %q, want %d", got.size, snapshot, activeSize)
	}
	end := min(got.size, want.size)
	pages := map[int64]bool{}
	for page := range got.pages {
		pages[page] = true
	}
	for page := range want.pages {
		pages[page] = true
	}
	for page := range pages {
		off := page * memPageSize
		if off >= end {
			continue
		}
		a, b := make([]byte, min(memPageSize, end-off)), make([]byte, min(memPageSize, end-off))
		got.readAt(a, off)
		want.readAt(b, off)
		if i := difference(a, b); i >= 0 {
			t.Fatalf("QEMU reads %#x at %#x of snapshot %q, want %#x", a[i], off+int64(i), snapshot, b[i])
		}
	}
	must(t, os.Remove(raw))
}

// loadSparse reads a file without its holes.
func loadSparse(t testing.TB, path string) *sparse {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	info, err := f.Stat()
	must(t, err)
	s := newSparse()
	buf := make([]byte, 1<<20)
	for at := int64(0); at < info.Size(); {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		must(t, err)
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		must(t, err)
		for off := start; off < end; off += int64(len(buf)) {
			b := buf[:min(int64(len(buf)), end-off)]
			_, err := f.ReadAt(b, off)
			must(t, err)
			s.writeAt(b, off)
		}
		at = end
	}
	s.size = info.Size()
	return s
}

func TestModel(t *testing.T) {
	for i := range *histories {
		seed := uint64(*firstSeed + i)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			h := newHistory(t, seed)
			h.play()
			if r, err := h.img.Check(t.Context(), nil); err != nil || r.ExitStatus() != 0 {
				t.Fatalf("our check of the open image: %+v, %v", r, err)
			}
			h.verify()
			must(t, h.img.Close())
			h.cleanCheck()
			h.verifyQEMU()
		})
	}
}

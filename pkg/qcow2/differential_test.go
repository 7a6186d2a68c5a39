package qcow2

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file lets QEMU and us take turns on the same image file: random histories over all that QEMU can create. What
// one has written, snapshotted, gone back to, deleted and resized, the other reads and goes on with; a model says what
// there has to be, and both checkers look after each of our turns.

var (
	differential      = flag.Int("differential", 40, "random histories for TestDifferential")
	firstDifferential = flag.Int("first-differential", 0, "seed of the first of them")
)

// duetKind is one point in the space of images.
type duetKind struct {
	cluster       int64
	version       int
	refcountBits  int
	extended      bool
	compression   string // of clusters that the image starts with: "" (none), zlib, zstd
	preallocation string
	lazy          bool
	ours          bool // we create it
}

func randomDuetKind(rng *rand.Rand) duetKind {
	k := duetKind{version: 3 - rng.IntN(5)/4, refcountBits: 16, preallocation: "off", ours: rng.IntN(3) == 0}
	k.cluster = []int64{512, 1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10}[rng.IntN(8)]
	if rng.IntN(40) == 0 {
		k.cluster = 2 << 20
	}
	if k.version == 3 {
		k.refcountBits = 1 << rng.IntN(7)
		k.extended = k.cluster >= 16<<10 && rng.IntN(2) == 0
		k.lazy = rng.IntN(6) == 0 && !k.ours
	}
	switch {
	case rng.IntN(3) != 0:
	case rng.IntN(2) == 0 && k.version == 3:
		k.compression, k.ours = "zstd", false
	default:
		k.compression, k.ours = "zlib", false
	}
	if k.compression == "" {
		k.preallocation = []string{"off", "off", "metadata", "falloc", "full"}[rng.IntN(5)]
	} else if k.refcountBits < 16 {
		k.refcountBits = 16 // several compressed clusters share a host cluster
	}
	return k
}

// options returns what qemu-img is told.
func (k duetKind) options() string {
	o := fmt.Sprintf("cluster_size=%d,refcount_bits=%d,compat=%s", k.cluster, k.refcountBits, map[int]string{2: "0.10", 3: "1.1"}[k.version])
	if k.extended {
		o += ",extended_l2=on"
	}
	if k.compression != "" && k.version == 3 {
		o += ",compression_type=" + k.compression
	}
	if k.lazy {
		o += ",lazy_refcounts=on"
	}
	if k.compression == "" {
		o += ",preallocation=" + k.preallocation
	}
	return o
}

// maxSnapshots is how many snapshots the counts have room for: QEMU's goto counts the snapshot once more meanwhile.
func (k duetKind) maxSnapshots() int { return min(3, 1<<min(k.refcountBits, 8)-3+k.refcountBits%2) }

// duetTally counts what was tried.
type duetTally struct {
	mu     sync.Mutex
	counts map[string]int
}

func (y *duetTally) add(what string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.counts[what]++
}

// addKind counts the values of all dimensions.
func (y *duetTally) addKind(k duetKind) {
	for _, what := range []string{
		fmt.Sprintf("cluster size %8d", k.cluster), fmt.Sprint("version ", k.version), fmt.Sprintf("refcount bits %2d", k.refcountBits),
		fmt.Sprint("extended L2 ", k.extended), "compression " + map[string]string{"": "none"}[k.compression] + k.compression,
		"preallocation " + k.preallocation, fmt.Sprint("lazy refcounts ", k.lazy), fmt.Sprint("created by us ", k.ours),
	} {
		y.add(what)
	}
}

// duet is an image in a file, and its model.
type duet struct {
	t     *testing.T
	rng   *rand.Rand
	kind  duetKind
	tally *duetTally
	path  string
	unit  int64 // offsets and lengths are multiples of it
	model model
	snaps int
	count int
	log   []string
}

func newDuet(t *testing.T, seed uint64, tally *duetTally) *duet {
	d := &duet{t: t, rng: rand.New(rand.NewPCG(seed, 1)), tally: tally, path: tempImage(t)}
	d.kind = randomDuetKind(d.rng)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d, %+v:\n%s", seed, d.kind, strings.Join(d.log, "\n"))
		}
	})
	tally.addKind(d.kind)
	d.unit = max(d.kind.cluster/[]int64{1, 4, 32}[d.rng.IntN(3)], format.SectorSize)
	d.create()
	return d
}

// create makes the image, of a few dozen clusters, or more than one L2 table of small ones.
func (d *duet) create() {
	d.t.Helper()
	k := d.kind
	size := k.cluster * (24 + d.rng.Int64N(100))
	if k.cluster >= 64<<10 {
		size = max(k.cluster*8, 1<<20)
	}
	size += d.rng.Int64N(4) * format.SectorSize
	d.model.active = newSparse()
	switch {
	case k.compression != "":
		for off := int64(0); off < size; off += k.cluster {
			d.model.active.writeAt(stamp(int(off/(3*k.cluster)), 0, min(k.cluster, size-off)), off)
		}
		d.model.active.size = size
		raw := filepath.Join(filepath.Dir(d.path), "raw")
		(&memFile{content: d.model.active}).save(d.t, raw)
		qemuImg(d.t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", k.options(), raw, d.path)
		must(d.t, os.Remove(raw))
	case k.ours:
		f, err := CreateFile(d.path)
		must(d.t, err)
		prealloc, err := ParsePreallocation(k.preallocation)
		must(d.t, err)
		must(d.t, Create(d.t.Context(), f, size, CreateOptions{
			ClusterSize: k.cluster, Version: k.version, RefcountBits: k.refcountBits, ExtendedL2: k.extended, Preallocation: prealloc,
		}))
		must(d.t, f.Close())
	default:
		qemuImg(d.t, "create", "-q", "-f", "qcow2", "-o", k.options(), d.path, fmt.Sprint(size))
	}
	d.model.active.size = size
}

func (d *duet) note(who, what, text string, args ...any) {
	d.tally.add(who + " " + what)
	d.log = append(d.log, fmt.Sprintf(who+" "+what+text, args...))
}

// span chooses a request.
func (d *duet) span() (off, n int64) {
	size := d.model.active.size
	off = d.rng.Int64N((size+d.unit-1)/d.unit) * d.unit
	return off, min(size-off, (1+d.rng.Int64N(12))*d.unit)
}

// qemu makes one turn with QEMU's tools.
func (d *duet) qemu() {
	d.t.Helper()
	before := d.rng.IntN(2) == 0
	if before {
		d.qemuSnapshot()
	}
	var commands []string
	for range 8 {
		d.count++
		off, n := d.span()
		b := byte(d.count)
		switch d.rng.IntN(6) {
		case 0:
			commands, b = append(commands, fmt.Sprintf("write -z %d %d", off, n)), 0
		case 1:
			// QEMU discards whole clusters only.
			off &^= d.kind.cluster - 1
			n = min(d.kind.cluster*(1+d.rng.Int64N(3)), d.model.active.size-off)
			commands, b = append(commands, fmt.Sprintf("discard %d %d", off, n)), 0
		case 2:
			commands, b = append(commands, fmt.Sprintf("write -z -u %d %d", off, n)), 0
		default:
			commands = append(commands, fmt.Sprintf("write -P %d %d %d", b, off, n))
		}
		d.tally.add("QEMU " + strings.Fields(commands[len(commands)-1])[0])
		p := make([]byte, n)
		for i := range p {
			p[i] = b
		}
		d.model.active.writeAt(p, off)
	}
	d.log = append(d.log, "QEMU: "+strings.Join(commands, "; "))
	qemuIO(d.t, d.path, commands...)
	if !before && len(d.model.snaps) < d.kind.maxSnapshots() {
		name := d.newName("qemu")
		d.note("QEMU", "snapshots", " %s", name)
		qemuImg(d.t, "snapshot", "-c", name, d.path)
		d.model.snaps = append(d.model.snaps, modelSnapshot{name: name, content: d.model.active.clone()})
	}
}

// qemuSnapshot lets QEMU go to a snapshot, delete it, or resize the disk.
func (d *duet) qemuSnapshot() {
	d.t.Helper()
	if len(d.model.snaps) == 0 {
		if d.rng.IntN(3) == 0 {
			d.qemuResize()
		}
		return
	}
	s := d.model.snaps[d.rng.IntN(len(d.model.snaps))]
	switch d.rng.IntN(4) {
	case 0:
		d.note("QEMU", "goes to", " %s", s.name)
		qemuImg(d.t, "snapshot", "-a", s.name, d.path)
		d.model.active = s.content.clone()
	case 1:
		d.note("QEMU", "deletes", " %s", s.name)
		qemuImg(d.t, "snapshot", "-d", s.name, d.path)
		d.forget(s.name)
	case 2:
		if d.kind.version == 3 {
			d.qemuResize()
		}
	}
}

func (d *duet) qemuResize() {
	d.t.Helper()
	d.model.active.size += (1 + d.rng.Int64N(8)) * d.unit
	d.note("QEMU", "resizes", " to %d", d.model.active.size)
	qemuImg(d.t, "resize", "-q", "-f", "qcow2", d.path, fmt.Sprint(d.model.active.size))
}

func (d *duet) newName(who string) string {
	d.snaps++
	return fmt.Sprintf("%s%d", who, d.snaps)
}

func (d *duet) forget(name string) {
	d.model.snaps = slices.DeleteFunc(d.model.snaps, func(s modelSnapshot) bool { return s.name == name })
}

// ours makes one turn with this package on the file, and compares everything before and after it.
func (d *duet) ours() {
	d.t.Helper()
	f, err := OpenFile(d.path, false)
	must(d.t, err)
	img, err := Open(f, OpenOptions{L2CacheSize: 4096})
	must(d.t, err)
	h := &history{t: d.t, rng: d.rng, img: img}
	d.verify(h)
	d.ourSnapshot(img)
	for range 8 {
		d.count++
		off, n := d.span()
		switch d.rng.IntN(5) {
		case 0:
			d.note("we", "zero", " %d %d", off, n)
			must(d.t, img.WriteZeroes(off, n))
			d.model.active.zero(off, n)
		case 1:
			d.note("we", "discard", " %d %d", off, n)
			must(d.t, img.Discard(off, n))
			d.model.active.zero(off, n)
		default:
			d.note("we", "write", " %d %d", off, n)
			p := stamp(d.count, off, n)
			_, err := img.WriteAt(p, off)
			must(d.t, err)
			d.model.active.writeAt(p, off)
		}
	}
	if len(d.model.snaps) < d.kind.maxSnapshots() {
		name := d.newName("ours")
		d.note("we", "snapshot", " %s", name)
		_, err := img.CreateSnapshot(d.t.Context(), name, nil)
		must(d.t, err)
		d.model.snaps = append(d.model.snaps, modelSnapshot{name: name, content: d.model.active.clone()})
	}
	d.verify(h)
	must(d.t, img.Close())
}

// verify takes the IDs that were given, and compares.
func (d *duet) verify(h *history) {
	d.t.Helper()
	for i, s := range h.img.Snapshots() {
		if i < len(d.model.snaps) {
			d.model.snaps[i].id = s.ID
		}
	}
	h.model = d.model
	h.verify()
}

// ourSnapshot goes to a snapshot, deletes it, or resizes the disk.
func (d *duet) ourSnapshot(img *Image) {
	d.t.Helper()
	op := d.rng.IntN(4)
	if op == 3 && (d.kind.version == 3 || len(d.model.snaps) == 0) {
		d.model.active.size += (1 + d.rng.Int64N(8)) * d.unit
		d.note("we", "resize", " to %d", d.model.active.size)
		must(d.t, img.Resize(d.t.Context(), d.model.active.size))
	}
	if op > 1 || len(d.model.snaps) == 0 {
		return
	}
	s := d.model.snaps[d.rng.IntN(len(d.model.snaps))]
	if op == 0 {
		d.note("we", "go to", " %s", s.name)
		must(d.t, img.GotoSnapshot(d.t.Context(), ByName(s.name)))
		d.model.active = s.content.clone()
		return
	}
	d.note("we", "delete", " %s", s.name)
	must(d.t, img.DeleteSnapshot(d.t.Context(), ByName(s.name)))
	d.forget(s.name)
}

// check demands a clean image in the eyes of both, and in the end that both read what the model has.
func (d *duet) check(contents bool) {
	d.t.Helper()
	if r, err := checkFile(d.t.Context(), loadMemFile(d.t, d.path)); err != nil || r.ExitStatus() != 0 {
		d.t.Fatalf("our check: %+v, %v", r, err)
	}
	if !contents {
		return
	}
	if c := runQemuCheck(d.t, d.path); c.exit != 0 {
		d.t.Fatalf("qemu-img check: %s", c.output)
	}
	img, err := Open(loadMemFile(d.t, d.path), OpenOptions{ReadOnly: true})
	must(d.t, err)
	d.verify(&history{t: d.t, rng: d.rng, img: img})
	must(d.t, img.Close())
	qemuReads(d.t, d.path, "", d.model.active, d.model.active.size)
	if len(d.model.snaps) > 0 { // one of them: to start QEMU takes its time, and there are many histories
		s := d.model.snaps[d.rng.IntN(len(d.model.snaps))]
		qemuReads(d.t, d.path, s.name, s.content, d.model.active.size)
	}
}

// play takes turns, QEMU first or we.
func (d *duet) play() {
	d.t.Helper()
	turns := []func(){d.qemu, d.ours}
	if d.rng.IntN(2) == 0 {
		slices.Reverse(turns)
	}
	for i := range 4 {
		turns[i%2]()
		d.check(i == 3)
	}
}

func TestDifferential(t *testing.T) {
	tally := &duetTally{counts: map[string]int{}}
	const batch = 100
	for first := 0; first < *differential; first += batch {
		t.Run(fmt.Sprint("from ", *firstDifferential+first), func(t *testing.T) {
			for i := first; i < min(first+batch, *differential); i++ {
				seed := uint64(*firstDifferential + i)
				t.Run(fmt.Sprint(seed), func(t *testing.T) {
					t.Parallel()
					newDuet(t, seed, tally).play()
					tally.add("histories that went well")
				})
			}
		})
		t.Logf("%d of %d histories", min(first+batch, *differential), *differential)
	}
	for _, what := range slices.Sorted(maps.Keys(tally.counts)) {
		t.Logf("%6d %s", tally.counts[what], what)
	}
}

// TestDifferentialBitmaps: our first write makes QEMU's dirty bitmaps stale; QEMU must know, and what they take up is a
// leak that its repair frees.
func TestDifferentialBitmaps(t *testing.T) {
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "4M")
	qemuImg(t, "bitmap", "--add", "-g", "512", path, "tracked")
	qemuIO(t, path, "write -P 1 0 1M")
	if r, err := checkFile(t.Context(), loadMemFile(t, path)); err != nil || r.ExitStatus() != 0 {
		t.Fatalf("as QEMU left it: %+v, %v", r, err)
	}
	f, err := OpenFile(path, false)
	must(t, err)
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(stamp(1, 0, 8192), 4096)
	must(t, err)
	_, err = img.CreateSnapshot(t.Context(), "one", nil)
	must(t, err)
	must(t, img.Close())

	r, err := checkFile(t.Context(), loadMemFile(t, path))
	must(t, err)
	c := runQemuCheck(t, path)
	if r.ExitStatus() != c.exit || r.Leaks != c.Leaks || r.Corruptions != 0 {
		t.Errorf("ours %+v, QEMU %s", r, c.output)
	}
	if strings.Contains(qemuImg(t, "info", path), "tracked") {
		t.Error("QEMU still trusts the bitmap")
	}
	qemuImg(t, "check", "-q", "-r", "leaks", path)
	if c := runQemuCheck(t, path); c.exit != 0 {
		t.Errorf("after the repair: %s", c.output)
	}
}

package qcow2

import (
	"encoding/binary"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

var (
	damagedImages = flag.Int("damaged", 23, "damaged images that TestDamage checks and repairs")
	soundImages   = flag.Int("sound", 10, "undamaged images that TestDamage checks")
)

// moreImages are images of further kinds, by name.
func moreImages(t testing.TB) map[string]func(path string) {
	history := func(path string) {
		qemuIO(t, path, "write -P 1 0 700000")
		qemuImg(t, "snapshot", "-c", "one", path)
		qemuIO(t, path, "write -P 2 100000 200000", "write -z 0 65536", "discard 262144 131072")
		qemuImg(t, "snapshot", "-c", "two", path)
		qemuIO(t, path, "write -P 3 500000 20000")
	}
	create := func(path, options string) { qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, "4M") }
	compressed := func(path, options string) {
		raw := filepath.Join(filepath.Dir(path), "raw")
		must(t, os.WriteFile(raw, []byte(strings.Repeat("compress me, I am a cluster\n", 1<<20/28)), 0o600))
		qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
		history(path)
	}
	return map[string]func(path string){
		"2 bit counts":      func(path string) { create(path, "cluster_size=4K,refcount_bits=2"); history(path) },
		"8 bit counts":      func(path string) { create(path, "cluster_size=4K,refcount_bits=8"); history(path) },
		"32 bit counts":     func(path string) { create(path, "cluster_size=64K,refcount_bits=32"); history(path) },
		"small subclusters": func(path string) { create(path, "cluster_size=16K,extended_l2=on"); history(path) },
		"zstd":              func(path string) { compressed(path, "cluster_size=4K,compression_type=zstd") },
		"zstd, subclusters": func(path string) { compressed(path, "cluster_size=16K,extended_l2=on,compression_type=zstd") },
		"VM state": func(path string) {
			create(path, "cluster_size=4K")
			qemuIO(t, path, "write -b -P 7 0 102400")
			history(path)
		},
		"ours": func(path string) {
			f := hostileImage(t, 3)
			f.save(t, path)
		},
	}
}

func imagesToDamage(t testing.TB) map[string]func(path string) {
	images := qemuImages(t)
	maps.Copy(images, moreImages(t))
	return images
}

// TestDamage checks images of all kinds, damaged and not, as `qemu-img check` does, and repairs the damaged ones.
func TestDamage(t *testing.T) {
	names := slices.Sorted(maps.Keys(imagesToDamage(t)))
	var damaged, stricter, sound, lost, compared, all atomic.Int64
	t.Run("images", func(t *testing.T) {
		for i, name := range names {
			share := func(n int) int { return (n + len(names) - 1 - i) / len(names) }
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				path := tempImage(t)
				imagesToDamage(t)[name](path)
				rng := rand.New(rand.NewPCG(5, uint64(i)))
				for range share(*soundImages) {
					checkSound(t, path)
					sound.Add(1)
					age(t, path, name, rng)
				}
				for range share(*damagedImages) {
					d := newDamage(t, loadMemFile(t, path), rng)
					lost.Add(d.repair(t, tempImage(t)))
					compared.Add(d.undoubted.clusters())
					all.Add(readable(t, d.sound).clusters())
					damaged.Add(1)
					if d.why != "" {
						stricter.Add(1)
						t.Logf("stricter than QEMU: %s: %s", d.what, d.why)
					}
				}
			})
		}
	})
	t.Logf("%d damaged images, %d of them judged more strictly than by QEMU; %d references given up; %d of %d clusters had one owner "+
		"beyond doubt and read unchanged; %d undamaged images",
		damaged.Load(), stricter.Load(), lost.Load(), compared.Load(), all.Load(), sound.Load())
	if compared.Load()*2 < all.Load() {
		t.Error("less than half of what there was could be compared")
	}
	if stricter.Load()*50 > damaged.Load() {
		t.Error("more than 2% are judged more strictly")
	}
}

// age changes a sound image a little.
func age(t *testing.T, path, name string, rng *rand.Rand) {
	t.Helper()
	if name == "empty" || name == "ours" {
		return
	}
	off := rng.IntN(512) << 10
	qemuIO(t, path, fmt.Sprintf("write -P %d %d 40000", 1+rng.IntN(200), off), fmt.Sprintf("discard %d 16384", rng.IntN(512)<<10))
}

// checkSound checks an image that is not damaged; a repair leaves it alone.
func checkSound(t *testing.T, path string) {
	t.Helper()
	f := loadMemFile(t, path)
	before := f.clone()
	if q, r := runQemuCheck(t, path), repairFile(t, f, RepairAll); q.exit != 0 || r.Found.ExitStatus() != 0 || !sameContent(f, before) {
		t.Errorf("an image that is not damaged: %+v\n%s", r, q.output)
	}
}

// damageCase is a damaged image.
type damageCase struct {
	sound, broken *memFile
	what          string // was changed
	words         []word // the same
	undoubted     content
	snapshots     bool   // that is in the snapshot table, or about it
	why           string // our verdict is stricter than QEMU's
}

func newDamage(t *testing.T, sound *memFile, rng *rand.Rand) *damageCase {
	t.Helper()
	d := &damageCase{sound: sound, broken: sound.clone()}
	h, err := format.ReadHeader(sound, format.DecodeHeader)
	must(t, err)
	for range 1 + rng.IntN(3)/2 { // one patch or two
		d.patch(t, &h, rng)
	}
	d.undoubted = newOwners(t, d.broken, &h, d.words).undoubted(sound, &h, !d.snapshots)
	return d
}

// place is where a table is.
type place struct {
	name            string
	offset, entries int64 // of 8 bytes
}

// places returns the tables of an image.
func places(t *testing.T, f *memFile, h *format.Header) []place {
	t.Helper()
	g := h.Geometry()
	all := []place{
		{"refcount table", int64(h.RefTableOffset), 2},
		{"refcount block", int64(get64(f, int64(h.RefTableOffset))), g.ClusterSize / 8},
	}
	l1Table := func(whose string, off, entries int64) {
		if entries == 0 {
			return
		}
		all = append(all, place{whose + " L1", off, entries})
		for i := range entries {
			if l2 := int64(get64(f, off+8*i) & format.OffsetMask); l2 != 0 {
				all = append(all, place{whose + " L2", l2, g.ClusterSize / 8})
				return
			}
		}
	}
	l1Table("active", int64(h.L1Offset), h.L1Size)
	rows, size, err := format.ScanSnapshotTable(f, h)
	must(t, err)
	if len(rows) > 0 {
		all = append(all, place{"snapshot table", int64(h.SnapshotsOffset), size / 8})
		row := rows[len(rows)-1]
		l1Table("snapshot's", int64(row.L1Offset), row.L1Size)
	}
	if h.Bitmaps != nil {
		all = append(all, place{"bitmap directory", int64(binary.BigEndian.Uint64(h.Bitmaps[16:])), 6})
	}
	return append(all, place{"header", 48, 6})
}

// patch damages one entry of one table.
func (d *damageCase) patch(t *testing.T, h *format.Header, rng *rand.Rand) {
	t.Helper()
	f, g := d.broken, h.Geometry()
	all := places(t, d.sound, h)
	p := all[rng.IntN(len(all))]
	at := p.offset + 8*rng.Int64N(p.entries)
	for range 200 { // one that is in use, if it is soon found
		if get64(f, at) != 0 {
			break
		}
		at = p.offset + 8*rng.Int64N(p.entries)
	}
	old := get64(f, at)
	v := old
	switch rng.IntN(8) {
	case 0, 1:
		v ^= 1 << rng.IntN(64)
	case 2:
		v = 0
	case 3:
		v ^= format.FlagCopied
	case 4:
		v = v&^uint64(format.OffsetMask) | uint64(rng.Int64N(f.content.size)>>g.ClusterBits<<g.ClusterBits)
	case 5:
		v = get64(f, p.offset+8*rng.Int64N(p.entries))
	case 6:
		v += uint64(g.ClusterSize)
	case 7:
		v = rng.Uint64()
	}
	if p.name == "header" {
		at, v = headerPatch(h, at, old, v)
	}
	d.words = append(d.words, word{at, get64(f, at), v})
	put64(f, at, v)
	d.snapshots = d.snapshots || p.name == "snapshot table" || p.name == "header"
	d.what += fmt.Sprintf("[%s at %#x, entry at %#x: %#x became %#x]", p.name, p.offset, at, old, v)
}

// headerPatch keeps features that make another image of it out of the game: of those only the dirty and the corrupt bit
// and the autoclear bits change.
func headerPatch(h *format.Header, at int64, old, v uint64) (int64, uint64) {
	switch {
	case at == 72 && h.Version < 3:
		return 48, v
	case at == 72:
		return at, old ^ (1 + v%3)
	case at == 80 && h.Version < 3:
		return 64, v
	case at == 80:
		return 88, v // autoclear
	}
	return at, v
}

// repair compares our verdict with QEMU's, repairs, and compares what can be read. It returns how many references the
// repair gave up.
func (d *damageCase) repair(t *testing.T, path string) int64 {
	t.Helper()
	d.broken.save(t, path)
	theirs := runQemuCheck(t, path)
	ours, err := Check(t.Context(), d.broken, nil)
	status := ours.ExitStatus()
	if err != nil {
		status = 1
	}
	if status != theirs.exit {
		if d.why = d.stricter(status, theirs.exit, ours, err); d.why == "" {
			t.Errorf("%s: we exit with %d, QEMU with %d: %+v, %v\n%s", d.what, status, theirs.exit, ours, err, theirs.output)
		}
	}

	before := readable(t, d.broken)
	r := repairFile(t, d.broken, RepairAll)
	d.broken.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 || r.Left.ExitStatus() != 0 {
		t.Errorf("%s: repaired %+v, still\n%s", d.what, r, q.output)
	}
	if d.snapshots {
		before = content{"": before[""]} // which snapshot is which is part of what was damaged
	}
	if diff := before.changed(t, d.broken); diff != "" {
		t.Errorf("%s: repaired %q: %s", d.what, r.Mended, diff)
	}
	if diff := d.undoubted.changed(t, d.broken); diff != "" {
		t.Errorf("%s: repaired %q: undamaged, but: %s", d.what, r.Mended, diff)
	}
	img, err := Open(d.broken, OpenOptions{})
	if err != nil {
		t.Errorf("%s: repaired, and not usable: %v", d.what, err)
		return r.Lost
	}
	must(t, img.Close())
	return r.Lost
}

// stricter says why our verdict is worse than QEMU's, "" if it is not, or for no reason.
func (d *damageCase) stricter(ours, theirs int, r CheckResult, err error) string {
	severity := map[int]int{0: 0, 3: 1, 2: 2, 1: 2}
	if severity[ours] < severity[theirs] {
		return ""
	}
	why := fmt.Sprintf("%d instead of %d: ", ours, theirs)
	if err != nil {
		return why + err.Error()
	}
	return why + strings.Join(r.Problems[:min(3, len(r.Problems))], "; ")
}

package qcow2

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// This file lets QEMU and us take turns on the same image file, in all the kinds that QEMU makes: what one has written,
// snapshotted, gone back to and deleted, the other reads and goes on with.

// duet is an image in a file, and its model.
type duet struct {
	t       *testing.T
	rng     *rand.Rand
	path    string
	unit    int64 // offsets and lengths are multiples of it
	cluster int64
	model   model
	snaps   int
	count   int
	log     []string
}

func (d *duet) note(format string, args ...any) { d.log = append(d.log, fmt.Sprintf(format, args...)) }

// span chooses a request.
func (d *duet) span() (off, n int64) {
	size := d.model.active.size
	off = d.rng.Int64N(size/d.unit) * d.unit
	return off, min(size-off, (1+d.rng.Int64N(12))*d.unit)
}

// qemu makes one turn with QEMU's tools.
func (d *duet) qemu() {
	d.t.Helper()
	if len(d.model.snaps) > 0 && d.rng.IntN(2) == 0 {
		s := d.model.snaps[d.rng.IntN(len(d.model.snaps))]
		if d.rng.IntN(2) == 0 {
			d.qemuGoto(s)
		} else {
			d.note("QEMU deletes %s", s.name)
			qemuImg(d.t, "snapshot", "-d", s.name, d.path)
			d.model.snaps = slices.DeleteFunc(d.model.snaps, func(x modelSnapshot) bool { return x.name == s.name })
		}
	}
	var commands []string
	for range 6 {
		d.count++
		off, n := d.span()
		b := byte(d.count)
		switch d.rng.IntN(5) {
		case 0:
			commands, b = append(commands, fmt.Sprintf("write -z %d %d", off, n)), 0
		case 1:
			// QEMU discards whole clusters only.
			off &^= d.cluster - 1
			n = min(d.cluster*(1+d.rng.Int64N(3)), d.model.active.size-off)
			commands, b = append(commands, fmt.Sprintf("discard %d %d", off, n)), 0
		case 2:
			commands, b = append(commands, fmt.Sprintf("write -z -u %d %d", off, n)), 0
		default:
			commands = append(commands, fmt.Sprintf("write -P %d %d %d", b, off, n))
		}
		p := make([]byte, n)
		for i := range p {
			p[i] = b
		}
		d.model.active.writeAt(p, off)
	}
	d.note("QEMU: %s", strings.Join(commands, "; "))
	qemuIO(d.t, d.path, commands...)
	if len(d.model.snaps) < 5 {
		name := d.newName("qemu")
		d.note("QEMU snapshots %s", name)
		qemuImg(d.t, "snapshot", "-c", name, d.path)
		d.model.snaps = append(d.model.snaps, modelSnapshot{name: name, content: d.model.active.clone()})
	}
}

// qemuGoto is left out where sizes differ in version 2, which QEMU cannot resize.
func (d *duet) qemuGoto(s modelSnapshot) {
	d.t.Helper()
	d.note("QEMU goes to %s", s.name)
	qemuImg(d.t, "snapshot", "-a", s.name, d.path)
	d.model.active = s.content.clone()
}

func (d *duet) newName(who string) string {
	d.snaps++
	return fmt.Sprintf("%s%d", who, d.snaps)
}

// ours makes one turn with this package on the file, and compares everything.
func (d *duet) ours() {
	d.t.Helper()
	f, err := OpenFile(d.path, false)
	must(d.t, err)
	img, err := Open(f, OpenOptions{L2CacheSize: 4096})
	must(d.t, err)
	h := &history{t: d.t, rng: d.rng, img: img, model: d.model}
	h.p.Version = img.Info().Version
	h.verify()
	if len(d.model.snaps) > 0 {
		s := d.model.snaps[d.rng.IntN(len(d.model.snaps))]
		switch d.rng.IntN(3) {
		case 0:
			d.note("we go to %s", s.name)
			must(d.t, img.GotoSnapshot(ByName(s.name)))
			d.model.active = s.content.clone()
		case 1:
			d.note("we delete %s", s.name)
			must(d.t, img.DeleteSnapshot(ByName(s.name)))
			d.model.snaps = slices.DeleteFunc(d.model.snaps, func(x modelSnapshot) bool { return x.name == s.name })
		}
	}
	if h.p.Version == 3 && d.rng.IntN(3) == 0 {
		d.model.active.size += 8 * d.unit
		d.note("we resize to %d", d.model.active.size)
		must(d.t, img.Resize(d.model.active.size))
	}
	for range 6 {
		d.count++
		off, n := d.span()
		switch d.rng.IntN(4) {
		case 0:
			d.note("we zero %d %d", off, n)
			must(d.t, img.WriteZeroes(off, n))
			d.model.active.zero(off, n)
		case 1:
			d.note("we discard %d %d", off, n)
			must(d.t, img.Discard(off, n))
			d.model.active.zero(off, n)
		default:
			d.note("we write %d %d", off, n)
			p := stamp(d.count, off, n)
			_, err := img.WriteAt(p, off)
			must(d.t, err)
			d.model.active.writeAt(p, off)
		}
	}
	if len(d.model.snaps) < 5 {
		name := d.newName("ours")
		d.note("we snapshot %s", name)
		_, err := img.CreateSnapshot(name, nil)
		must(d.t, err)
		d.model.snaps = append(d.model.snaps, modelSnapshot{name: name, content: d.model.active.clone()})
	}
	h.model = d.model
	for i, s := range img.Snapshots() {
		d.model.snaps[i].id = s.ID
	}
	h.verify()
	must(d.t, img.Close())
}

// check demands a clean image in the eyes of both, and that QEMU reads what the model has.
func (d *duet) check(contents bool) {
	d.t.Helper()
	f := loadMemFile(d.t, d.path)
	if r, err := checkFile(d.t.Context(), f); err != nil || r.ExitStatus() != 0 {
		d.t.Fatalf("our check: %+v, %v", r, err)
	}
	if c := runQemuCheck(d.t, d.path); c.exit != 0 {
		d.t.Fatalf("qemu-img check: %s", c.output)
	}
	if !contents {
		return
	}
	qemuReads(d.t, d.path, "", d.model.active, d.model.active.size)
	for _, s := range d.model.snaps {
		qemuReads(d.t, d.path, s.name, s.content, d.model.active.size)
	}
}

// refresh takes the IDs that QEMU gave.
func (d *duet) refresh() {
	d.t.Helper()
	img, err := Open(loadMemFile(d.t, d.path), OpenOptions{ReadOnly: true})
	must(d.t, err)
	for i, s := range img.Snapshots() {
		d.model.snaps[i].id = s.ID
	}
	must(d.t, img.Close())
}

func TestOracle(t *testing.T) {
	for _, test := range []struct {
		name                string
		size, unit, cluster int64
		options             string
		compressed          bool
	}{
		{"512", 100 << 10, 512, 512, "", false},
		{"4K", 400 << 10, 1024, 4 << 10, "", false},
		{"64K", 2 << 20, 16 << 10, 64 << 10, "", false},
		{"2M", 20 << 20, 1 << 20, 2 << 20, "", false},
		{"v2", 400 << 10, 1024, 4 << 10, ",compat=0.10", false},
		{"preallocated", 400 << 10, 1024, 4 << 10, ",preallocation=metadata", false},
		{"lazy refcounts", 400 << 10, 1024, 4 << 10, ",lazy_refcounts=on", false},
		{"compressed", 400 << 10, 1024, 4 << 10, "", true},
		{"compressed zstd", 400 << 10, 1024, 4 << 10, ",compression_type=zstd", true},
		{"compressed 64K", 2 << 20, 16 << 10, 64 << 10, "", true},
		{"compressed v2", 400 << 10, 1024, 4 << 10, ",compat=0.10", true},
		{"subclusters", 2 << 20, 4 << 10, 64 << 10, ",extended_l2=on", false},
		{"compressed subclusters", 2 << 20, 4 << 10, 64 << 10, ",extended_l2=on", true},
		{"64 bit counts", 400 << 10, 1024, 4 << 10, ",refcount_bits=64", false},
		{"4 bit counts", 400 << 10, 1024, 4 << 10, ",refcount_bits=4", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := &duet{t: t, rng: rand.New(rand.NewPCG(11, uint64(len(test.options)))), path: tempImage(t), unit: test.unit}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("%s", strings.Join(d.log, "\n"))
				}
			})
			d.model.active = newSparse()
			d.cluster = test.cluster
			options := fmt.Sprintf("cluster_size=%d%s", test.cluster, test.options)
			if test.compressed {
				for off := int64(0); off < test.size; off += test.unit {
					d.model.active.writeAt(stamp(int(off/(3*test.unit)), 0, test.unit), off)
				}
				raw := tempImage(t)
				(&memFile{content: d.model.active}).save(t, raw)
				qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, d.path)
			} else {
				qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, d.path, fmt.Sprint(test.size))
			}
			d.model.active.size = test.size
			for turn := range 2 {
				d.qemu()
				d.check(false)
				d.refresh()
				d.ours()
				d.check(turn == 1)
			}
		})
	}
}

// TestOracleBitmaps: our first write makes QEMU's dirty bitmaps stale; QEMU must know, and what they take up is a leak
// that its repair frees.
func TestOracleBitmaps(t *testing.T) {
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
	_, err = img.CreateSnapshot("one", nil)
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

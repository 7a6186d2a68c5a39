package qcow2

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os/exec"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

var usedImages = flag.Int("used", 24, "damaged images that TestUseOfDamaged uses")

// TestUseOfDamaged damages counts, pointers and flags, and lets us and QEMU do the same with the image. Nothing that QEMU keeps
// may be lost by us.
func TestUseOfDamaged(t *testing.T) {
	images := imagesToDamage(t)
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(images)), func(name string) bool { return name == "empty" || name == "ours" })
	var lost, theirs, refused, used atomic.Int64
	t.Run("images", func(t *testing.T) {
		for i, name := range names {
			n := (*usedImages + len(names) - 1 - i) / len(names)
			if n == 0 {
				continue
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				path := tempImage(t)
				imagesToDamage(t)[name](path)
				rng := rand.New(rand.NewPCG(16, uint64(i)))
				sound := loadMemFile(t, path)
				for k := range n {
					d := damageForUse(t, sound, rng)
					d.served = k%2 == 1
					ours, qemu, err := d.use(t, sound, rng)
					lost.Add(int64(len(ours)))
					theirs.Add(qemu)
					if used.Add(1); err != nil {
						refused.Add(1)
					}
					if len(ours) > 0 {
						t.Errorf("%s, then %q, served %t (%v): lost %q", d.what, d.ops, d.served, err, ours[:min(len(ours), 8)])
					}
				}
			})
		}
	})
	t.Logf("%d damaged images were used, of which we refused to write %d: we lost %d clusters that QEMU kept; QEMU lost %d that we kept",
		used.Load(), refused.Load(), lost.Load(), theirs.Load())
	if refused.Load() == 0 || refused.Load() == used.Load() && used.Load() > 20 {
		t.Error("either no damage does harm, or all of it: nothing is tried")
	}
}

// usedDamage is a damaged image and what is done with it.
type usedDamage struct {
	broken   *memFile
	what     string
	ops      []string
	snapshot string // the name of the one that is deleted and gone to, "" if there is none
	id       string
	wrote    struct{ off, n int64 } // guest bytes
	served   bool
}

// damageForUse damages one thing, or two.
func damageForUse(t *testing.T, sound *memFile, rng *rand.Rand) *usedDamage {
	t.Helper()
	h, err := format.ReadHeader(sound, format.DecodeHeader)
	must(t, err)
	d := &usedDamage{broken: sound.clone()}
	for range 1 + rng.IntN(3)/2 {
		if rng.IntN(2) == 0 {
			d.damageCounts(t, &h, rng)
		} else {
			d.damagePointer(t, sound, &h, rng)
		}
	}
	return d
}

// damageCounts zeroes the last counts, a run of them or one, or lowers one.
func (d *usedDamage) damageCounts(t *testing.T, h *format.Header, rng *rand.Rand) {
	t.Helper()
	g := h.Geometry()
	last := (g.Clusters(d.broken.content.size) - 1) >> g.BlockBits
	k := rng.Int64N(last + 1)
	at := int64(get64(d.broken, int64(h.RefTableOffset)+8*k))
	if at == 0 {
		return
	}
	b := format.Counts{B: make([]byte, g.ClusterSize), Order: h.RefcountOrder}
	must(t, format.ReadPadded(d.broken, b.B, format.HostOffset(at)))
	n := min(g.BlockCounts, g.Clusters(d.broken.content.size)-k<<g.BlockBits)
	first := rng.Int64N(n)
	switch rng.IntN(4) {
	case 0:
		b.Fill(first, n-first, 0)
		d.what += fmt.Sprintf("[counts of clusters %d to the end: 0]", k<<g.BlockBits+first)
	case 1:
		m := 1 + rng.Int64N(min(n-first, 32))
		b.Fill(first, m, 0)
		d.what += fmt.Sprintf("[%d counts from cluster %d on: 0]", m, k<<g.BlockBits+first)
	default:
		v := b.Get(first)
		lower := uint64(0)
		if v > 1 && rng.IntN(2) == 0 {
			lower = v - 1
		}
		b.Set(first, lower)
		d.what += fmt.Sprintf("[count of cluster %d: %d became %d]", k<<g.BlockBits+first, v, lower)
	}
	d.broken.content.writeAt(b.B, at)
}

// damagePointer changes an entry of an L1 or L2 table, of the active disk or of a snapshot, or only its flag.
func (d *usedDamage) damagePointer(t *testing.T, sound *memFile, h *format.Header, rng *rand.Rand) {
	t.Helper()
	g := h.Geometry()
	tables := slices.DeleteFunc(places(t, sound, h), func(p place) bool {
		return !slices.Contains([]string{"active L1", "active L2", "snapshot's L1", "snapshot's L2"}, p.name)
	})
	p := tables[rng.IntN(len(tables))]
	stride := int64(8)
	if p.name[len(p.name)-1] == '2' {
		stride = g.L2EntrySize()
	}
	at := p.offset + stride*rng.Int64N(p.entries*8/stride)
	for range 200 {
		if get64(d.broken, at) != 0 {
			break
		}
		at = p.offset + stride*rng.Int64N(p.entries*8/stride)
	}
	old := get64(d.broken, at)
	v := old
	switch rng.IntN(6) {
	case 0, 1:
		v ^= format.FlagCopied
	case 2:
		v = v&^uint64(format.OffsetMask) | uint64(rng.Int64N(d.broken.content.size)>>g.ClusterBits<<g.ClusterBits)
	case 3:
		v = get64(d.broken, p.offset+stride*rng.Int64N(p.entries*8/stride))
	case 4:
		v += uint64(g.ClusterSize)
	case 5:
		v = 0
	}
	put64(d.broken, at, v)
	d.what += fmt.Sprintf("[%s, entry at %#x: %#x became %#x]", p.name, at, old, v)
}

// use does the same with the image, by us and by QEMU, and returns the clusters that only we have lost, how many only QEMU has,
// and why we did not go on.
func (d *usedDamage) use(t *testing.T, sound *memFile, rng *rand.Rand) (lost []string, theirs int64, refused error) {
	t.Helper()
	img, err := Open(sound.clone(), OpenOptions{ReadOnly: true})
	must(t, err)
	if ss := img.Snapshots(); len(ss) > 0 {
		d.snapshot, d.id = ss[0].Name, ss[0].ID
	}
	size, cluster := img.Size(), img.ClusterSize()
	must(t, img.Close())
	unit := size / 16 &^ 511
	d.wrote.off, d.wrote.n = rng.Int64N(12)*unit, (1+rng.Int64N(4))*unit
	all := []string{"read", "flush", "create", "delete", "goto", "resize", "write"}
	for range 1 + rng.IntN(3) {
		d.ops = append(d.ops, all[rng.IntN(len(all))])
	}

	ours, qemu := tempImage(t), tempImage(t)
	d.broken.save(t, ours)
	d.broken.save(t, qemu)
	for i, op := range d.ops {
		if err := d.ourOp(t.Context(), ours, op, i, size); err != nil && refused == nil {
			refused = err
		}
		d.qemuOp(t, qemu, op, i, size)
	}
	if refused != nil && errors.Is(refused, ErrFailed) {
		t.Errorf("%s: %v", d.what, refused)
	}
	before, damaged := readable(t, sound), readable(t, d.broken)
	mine, other := readable(t, loadMemFile(t, ours)), readable(t, loadMemFile(t, qemu))
	for name, clusters := range before {
		for off := range clusters {
			if name == "" && off+cluster > d.wrote.off && off < d.wrote.off+d.wrote.n && slices.Contains(d.ops, "write") {
				continue
			}
			may := func(b []byte) bool {
				return b != nil && (bytes.Equal(b, clusters[off]) ||
					name == "" && slices.Contains(d.ops, "goto") && bytes.Equal(b, before["snapshot "+d.id][off]))
			}
			switch {
			case name == "snapshot "+d.id && slices.Contains(d.ops, "delete"):
			case may(other[name][off]) && !may(mine[name][off]):
				if bytes.Equal(mine[name][off], damaged[name][off]) {
					continue // we have done nothing to it
				}
				lost = append(lost, fmt.Sprintf("%s at %#x", name, off))
			case may(mine[name][off]) && !may(other[name][off]):
				theirs++
			}
		}
	}
	return lost, theirs, refused
}

// ourOp opens the image, does one thing, and closes it.
func (d *usedDamage) ourOp(ctx context.Context, path, op string, number int, size int64) error {
	img, err := openAt(path, d.served)
	if err != nil {
		return err
	}
	switch op {
	case "read":
		_, err = img.ReadAt(make([]byte, size), 0)
	case "flush":
		err = img.Flush()
	case "create":
		_, err = img.CreateSnapshot(ctx, fmt.Sprint("new ", number), nil)
	case "delete":
		err = img.DeleteSnapshot(ctx, ByName(d.snapshot))
	case "goto":
		err = img.GotoSnapshot(ctx, ByName(d.snapshot))
	case "resize":
		err = img.Resize(ctx, img.Size()+1<<20)
	case "write":
		_, err = img.WriteAt(bytes.Repeat([]byte{9}, int(d.wrote.n)), d.wrote.off)
	}
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrLimit) {
		err = nil // QEMU does not do it either
	}
	return errors.Join(err, img.Close())
}

// qemuOp does the same with QEMU's tools, as far as they can.
func (d *usedDamage) qemuOp(t *testing.T, path, op string, number int, size int64) {
	t.Helper()
	io := func(command string) []string {
		return []string{"qemu-io", "-f", "qcow2", "-d", "unmap", "-c", command, path}
	}
	args := map[string][]string{
		"read":   io(fmt.Sprintf("read 0 %d", size)),
		"flush":  io("flush"),
		"create": {"qemu-img", "snapshot", "-c", fmt.Sprint("new ", number), path},
		"delete": {"qemu-img", "snapshot", "-d", d.snapshot, path},
		"goto":   {"qemu-img", "snapshot", "-a", d.snapshot, path},
		"resize": {"qemu-img", "resize", "-q", "-f", "qcow2", path, "+1M"},
		"write":  io(fmt.Sprintf("write -P 9 %d %d", d.wrote.off, d.wrote.n)),
	}[op]
	_ = exec.CommandContext(t.Context(), args[0], args[1:]...).Run()
}

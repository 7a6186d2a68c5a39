package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// qemuImages are images of many kinds as QEMU makes them, small, by name.
func qemuImages(t testing.TB) map[string]func(path string) {
	snapshots := func(path string, disk int) {
		n := fmt.Sprint(disk / 4)
		qemuIO(t, path, "write -P 1 0 "+n, "write -P 2 "+n+" 512")
		qemuImg(t, "snapshot", "-c", "one", path)
		qemuIO(t, path, "write -P 3 0 512", "write -z "+n+" 512", "discard 0 "+n)
		qemuImg(t, "snapshot", "-c", "two", path)
		qemuImg(t, "snapshot", "-c", "three", path)
		qemuIO(t, path, "write -P 4 "+n+" "+n)
		qemuImg(t, "snapshot", "-a", "one", path)
		qemuIO(t, path, "write -P 5 0 "+n)
		qemuImg(t, "snapshot", "-d", "two", path)
	}
	create := func(path, options, size string) {
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, size)
	}
	return map[string]func(path string){
		"empty": func(path string) { create(path, "compat=1.1", "0") },
		"fresh": func(path string) { create(path, "compat=1.1", "1M") },
		"v2":    func(path string) { create(path, "compat=0.10", "1M"); snapshots(path, 1<<20) },
		"512":   func(path string) { create(path, "cluster_size=512", "1M"); snapshots(path, 1<<20) },
		"4K":    func(path string) { create(path, "cluster_size=4K", "4M"); snapshots(path, 4<<20) },
		"64K":   func(path string) { create(path, "cluster_size=64K", "4M"); snapshots(path, 4<<20) },
		"2M":    func(path string) { create(path, "cluster_size=2M", "16M"); snapshots(path, 16<<20) },
		"metadata": func(path string) {
			create(path, "preallocation=metadata,cluster_size=4K", "1M")
			snapshots(path, 1<<20)
		},
		"odd size": func(path string) { create(path, "cluster_size=64K", "1000000"); snapshots(path, 1000000/2048*2048) },
		"compressed": func(path string) {
			raw := filepath.Join(filepath.Dir(path), "raw")
			must(t, os.WriteFile(raw, []byte(strings.Repeat("compress me, I am a cluster\n", 1<<20/28)), 0o600))
			qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4K", raw, path)
			qemuImg(t, "snapshot", "-c", "one", path)
			qemuIO(t, path, "write -P 3 0 6000")
			qemuImg(t, "snapshot", "-c", "two", path)
		},
		"1 bit counts": func(path string) {
			create(path, "cluster_size=4K,refcount_bits=1", "1M")
			qemuIO(t, path, "write -P 1 0 100000", "write -z 8192 8192")
		},
		"4 bit counts":  func(path string) { create(path, "cluster_size=4K,refcount_bits=4", "1M"); snapshots(path, 1<<20) },
		"64 bit counts": func(path string) { create(path, "cluster_size=4K,refcount_bits=64", "1M"); snapshots(path, 1<<20) },
		"subclusters":   func(path string) { create(path, "cluster_size=64K,extended_l2=on", "4M"); snapshots(path, 4<<20) },
		"bitmaps": func(path string) {
			create(path, "cluster_size=4K", "4M")
			qemuImg(t, "bitmap", "--add", "-g", "512", path, "first")
			qemuImg(t, "bitmap", "--add", path, "second")
			qemuIO(t, path, "write -P 1 0 1M")
		},
	}
}

// damages is how often TestCheckQEMU damages each image.
var damages = flag.Int("damages", 8, "random damages of each image for the checker")

// TestCheckQEMU holds our verdict on QEMU's images against QEMU's, and so on each after many small damages.
func TestCheckQEMU(t *testing.T) {
	for name, build := range qemuImages(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := tempImage(t)
			build(path)
			f := loadMemFile(t, path)
			sameVerdict(t, f, path)
			rng := rand.New(rand.NewPCG(2, uint64(len(name))))
			for i := range *damages {
				broken := f.clone()
				what := damage(t, broken, rng)
				broken.save(t, path)
				if !sameVerdict(t, broken, path) {
					t.Errorf("damage %d: %s", i, what)
				}
			}
		})
	}
}

// sameVerdict compares our check of f with QEMU's of the same bytes at path.
func sameVerdict(t *testing.T, f *memFile, path string) bool {
	t.Helper()
	theirs := runQemuCheck(t, path)
	ours, err := checkFile(t.Context(), f)
	exit := ours.ExitStatus()
	if err != nil {
		exit = 1
	}
	// QEMU gives up (1) on some corruptions that we report as such (2), and the other way round.
	fatal := func(exit int) bool { return exit == 1 || exit == 2 }
	same := exit == theirs.exit || fatal(exit) && fatal(theirs.exit)
	if exit == theirs.exit && exit != 1 && exit != 2 {
		same = ours.Leaks == theirs.Leaks && ours.ImageEnd == theirs.ImageEnd &&
			ours.Clusters == theirs.Total && ours.Allocated == theirs.Allocated
	}
	if !same {
		t.Errorf("ours %+v, %v\nQEMU: %d: %s", ours, err, theirs.exit, theirs.output)
	}
	return same
}

// damage changes a random place in the metadata and says which.
func damage(t testing.TB, f *memFile, rng *rand.Rand) string {
	t.Helper()
	get := func(off int64) uint64 {
		var b [8]byte
		_, err := f.ReadAt(b[:], off)
		must(t, err)
		return binary.BigEndian.Uint64(b[:])
	}
	put := func(off int64, v uint64) {
		_, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, v), off)
		must(t, err)
	}
	first := make([]byte, format.SectorSize)
	_, err := f.ReadAt(first, 0)
	must(t, err)
	h, err := format.DecodeHeader(first)
	must(t, err)
	g := h.Geometry()

	// Choose a table.
	table, entries, kind := int64(h.L1Offset), h.L1Size, "L1"
	if h.L1Size == 0 {
		table, entries, kind = int64(h.RefTableOffset), 1, "refcount table"
	}
	l2 := int64(0)
	for i := range h.L1Size {
		if off := int64(get(int64(h.L1Offset)+8*i) & format.OffsetMask); off != 0 && (l2 == 0 || rng.IntN(2) == 0) {
			l2 = off
		}
	}
	switch n := rng.IntN(6); {
	case n <= 1 && l2 != 0:
		table, entries, kind = l2, g.L2Entries, "L2"
	case n == 2:
		table, entries, kind = int64(h.RefTableOffset), 1, "refcount table"
	case n == 3:
		table, entries, kind = int64(get(int64(h.RefTableOffset))), g.ClusterSize/8, "refcount block"
	case n == 4 && h.Snapshots > 0:
		table, entries, kind = int64(h.SnapshotsOffset), 5, "snapshot table"
	}
	// In it an entry that is in use, if one is soon found.
	at := table + 8*rng.Int64N(max(entries, 1))
	for range 200 {
		if get(at) != 0 {
			break
		}
		at = table + 8*rng.Int64N(max(entries, 1))
	}
	old := get(at)
	v := old
	switch rng.IntN(6) {
	case 0:
		v ^= 1 << rng.IntN(64)
	case 1:
		v = 0
	case 2:
		v ^= 1 << 63 // COPIED
	case 3:
		v = v&^uint64(format.OffsetMask) | uint64(rng.Int64N(f.content.size)>>g.ClusterBits<<g.ClusterBits)
	case 4:
		v = get(table + 8*rng.Int64N(max(entries, 1)))
	case 5:
		v += uint64(g.ClusterSize)
	}
	if h.Version == 2 && kind == "L2" && v&^old&format.FlagZero != 0 && v&format.FlagCompressed == 0 {
		v &^= format.FlagZero // QEMU's check accepts it in version 2; reading does not, nor do we
	}
	put(at, v)
	return fmt.Sprintf("%s at %#x, entry at %#x: %#x became %#x", kind, table, at, old, v)
}

func TestCheckEndsWithContext(t *testing.T) {
	path := tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := checkFile(ctx, loadMemFile(t, path)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestCheckSharedTables reads a table once however many paths lead to it: an L1 of a million entries that all point at
// one L2 table, whose entries all point at one cluster, takes no time, and each path is counted.
func TestCheckSharedTables(t *testing.T) {
	for _, refcountBits := range []int{16, 64} {
		f := newMemFile("shared")
		const entries = 1 << 20
		must(t, Create(t.Context(), f, entries*64*512, CreateOptions{ClusterSize: 512, RefcountBits: refcountBits}))
		end := f.content.size
		data, l2 := end, end+512
		for i := range int64(64) {
			put64(f, l2+8*i, uint64(data))
		}
		entry := binary.BigEndian.AppendUint64(nil, uint64(l2))
		f.content.writeAt(bytes.Repeat(entry, entries), l1At(f))
		reads := 0
		f.setFault(func(c fileCall) error {
			if c.kind == callRead {
				reads += int(c.n)
			}
			return nil
		})
		r, err := checkFile(t.Context(), f)
		must(t, err)
		if r.Corruptions == 0 {
			t.Errorf("%d bits: clusters with a count of 0 are referenced, but all is well: %+v", refcountBits, r)
		}
		if limit := 3 * int(f.content.size); reads > limit {
			t.Errorf("%d bits: %d bytes read of a file of %d", refcountBits, reads, f.content.size)
		}
	}
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file makes the images that the fuzz targets start from, breaks them as the fuzzer says, and watches over the
// file behind them.

// fuzzSeed is a sound image and where its metadata lies.
type fuzzSeed struct {
	name    string
	file    *memFile
	regions []fuzzRegion
	cluster int64
}

// fuzzRegion is a place to patch.
type fuzzRegion struct{ off, n int64 }

// fuzzSeeds makes small images of all kinds, by us and by QEMU. Their order is part of the corpora: add at the end.
func fuzzSeeds(t testing.TB) []fuzzSeed {
	t.Helper()
	var seeds []fuzzSeed
	add := func(name string, f *memFile) { seeds = append(seeds, newFuzzSeed(t, name, f)) }
	ours := func(o CreateOptions, size int64) *memFile {
		f := newMemFile("ours")
		must(t, Create(t.Context(), f, size, o))
		fillFuzzSeed(t, f, o.RefcountBits != 1)
		return f
	}
	qemu := func(options string, size int64, commands ...string) *memFile {
		path := tempImage(t)
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
		if len(commands) > 0 {
			qemuIO(t, path, commands...)
		}
		return loadMemFile(t, path)
	}
	compressed := func(options string) *memFile {
		raw, path := filepath.Join(t.TempDir(), "raw"), tempImage(t)
		must(t, os.WriteFile(raw, []byte(strings.Repeat("compress me, I am a cluster\n", 128<<10/28)), 0o600))
		qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
		qemuImg(t, "snapshot", "-c", "compressed", path)
		qemuIO(t, path, "write -P 3 0 6000")
		return loadMemFile(t, path)
	}
	add("512", ours(CreateOptions{ClusterSize: 512}, 64<<10))
	add("512 v2", ours(CreateOptions{ClusterSize: 512, Version: 2}, 64<<10))
	add("subclusters", ours(CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, 1<<20))
	add("1 bit counts", ours(CreateOptions{ClusterSize: 512, RefcountBits: 1}, 64<<10))
	add("64 bit counts", ours(CreateOptions{ClusterSize: 1024, RefcountBits: 64}, 64<<10))
	add("64K", ours(CreateOptions{}, 640<<10))
	add("deflate", compressed("cluster_size=4K"))
	add("zstd", compressed("cluster_size=4K,compression_type=zstd"))
	add("deflate, subclusters", compressed("cluster_size=16K,extended_l2=on"))
	bitmaps := func() *memFile {
		path := tempImage(t)
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=1K", path, "256K")
		qemuImg(t, "bitmap", "--add", "-g", "512", path, "tracked")
		qemuIO(t, path, "write -P 1 0 20K")
		return loadMemFile(t, path)
	}
	add("bitmaps", bitmaps())
	add("preallocated", qemu("cluster_size=512,preallocation=metadata", 40<<10, "write -P 1 0 1K"))
	add("empty", qemu("cluster_size=512", 0))
	for i := range seeds {
		if r, err := checkFile(t.Context(), seeds[i].file.clone()); err != nil || r.ExitStatus() != 0 {
			t.Fatalf("seed %s: %+v, %v", seeds[i].name, r, err)
		}
	}
	return seeds
}

// fillFuzzSeed writes and, if counts allow it, takes snapshots.
func fillFuzzSeed(t testing.TB, f *memFile, snapshots bool) {
	t.Helper()
	img, err := Open(f, OpenOptions{})
	must(t, err)
	c, size := img.ClusterSize(), img.Size()
	_, err = img.WriteAt(stamp(1, 0, min(8*c, size/2)), 0)
	must(t, err)
	if snapshots {
		_, err = img.CreateSnapshot(t.Context(), "one", nil)
		must(t, err)
		_, err = img.WriteAt(stamp(2, c, 2*c), c)
		must(t, err)
		_, err = img.CreateSnapshot(t.Context(), "two", nil)
		must(t, err)
	}
	_, err = img.WriteAt(stamp(3, 0, c), 0)
	must(t, err)
	_, err = img.WriteAt(stamp(3, size-c, c/2), size-c)
	must(t, err)
	must(t, img.WriteZeroes(0, c))
	must(t, img.Close())
	f.reopen()
}

// newFuzzSeed finds the metadata of f.
func newFuzzSeed(t testing.TB, name string, f *memFile) fuzzSeed {
	t.Helper()
	h, err := format.ReadHeader(f, format.DecodeHeader)
	must(t, err)
	s := fuzzSeed{name: name, file: f, cluster: 1 << h.ClusterBits}
	add := func(off, n int64) { s.regions = append(s.regions, fuzzRegion{off, n}) }
	tables := func(off, n int64) {
		add(off, n*8)
		for i := range n {
			if at := int64(get64(f, off+8*i) & format.OffsetMask); at != 0 {
				add(at, s.cluster)
			}
		}
	}
	add(0, 256)
	tables(int64(h.RefTableOffset), min(h.RefTableClusters<<h.ClusterBits/8, 8))
	tables(int64(h.L1Offset), h.L1Size)
	rows, size, err := format.ReadSnapshotTable(f, &h)
	must(t, err)
	if size > 0 {
		add(int64(h.SnapshotsOffset), size)
	}
	for _, row := range rows {
		tables(int64(row.L1Offset), row.L1Size)
	}
	add(0, f.content.size)
	return s
}

// patchBytes is the length of a patch in a fuzzer's input.
const patchBytes = 8

// patched returns the seed's image with patches: each is a region, an offset in it (2 bytes), a way to
// change what is there, and a value (4 bytes). At most so many are made that the image is still like one.
func (s *fuzzSeed) patched(patches []byte) *memFile {
	f := s.file.clone()
	for n := 0; len(patches) >= patchBytes && n < 32; n++ {
		p := patches[:patchBytes]
		patches = patches[patchBytes:]
		r := s.regions[int(p[0])%len(s.regions)]
		if r.n == 0 {
			continue
		}
		v := binary.LittleEndian.Uint32(p[4:])
		at := r.off + int64(binary.LittleEndian.Uint16(p[1:]))*8%r.n&^7
		old := get64(f, at)
		switch p[3] % 8 {
		case 0: // one byte
			f.content.writeAt([]byte{byte(v)}, at+int64(p[5]%8))
		case 1:
			put32(f, at, v)
		case 2:
			put32(f, at+4, v)
		case 3: // a reference to some cluster, perhaps a little behind the end, with flags
			clusters := f.content.size/s.cluster + 3
			flags := uint64(p[6])<<56 | uint64(p[7]&3)
			put64(f, at, uint64(int64(binary.LittleEndian.Uint16(p[4:]))%clusters*s.cluster)|flags)
		case 4: // one bit
			put64(f, at, old^1<<(v%64))
		case 5: // what another entry of the table has
			put64(f, at, get64(f, r.off+int64(v)*8%r.n&^7))
		case 6: // a little more or less
			put64(f, at, old+uint64(int64(int32(v))))
		case 7: // another length, sparse
			f.content.truncate(min(int64(v)<<9&(64<<20-1), 16*f.content.size))
		}
	}
	return f
}

// watchedFile is a File that keeps an eye on what is asked of it: requests must lie within what the image's own length
// and what was written to it justify, and their number is bounded.
type watchedFile struct {
	*memFile
	limit    int64 // writes end before it
	most     int64 // calls
	made     atomic.Int64
	violated atomic.Pointer[string]
}

// watch allows a file to grow by more bytes.
func watch(f *memFile, growth, calls int64) *watchedFile {
	return &watchedFile{memFile: f, limit: 2*f.content.size + growth, most: calls}
}

func (w *watchedFile) call(what string, off, n int64, changes bool) error {
	violation := ""
	switch made := w.made.Add(1); {
	case made > w.most:
		violation = fmt.Sprintf("more than %d calls", w.most)
	case off < 0 || n < 0 || off+n < 0:
		violation = "a negative offset or length"
	case changes && off+n > w.limit:
		violation = fmt.Sprintf("beyond the limit %#x", w.limit)
	case n > 64<<20 && what != "punch":
		violation = "a huge request"
	default:
		return nil
	}
	violation = fmt.Sprintf("%s %#x+%#x: %s\n%s", what, off, n, violation, debug.Stack())
	w.violated.CompareAndSwap(nil, &violation)
	return errors.New(violation)
}

func (w *watchedFile) ReadAt(p []byte, off int64) (int, error) {
	if err := w.call("read", off, int64(len(p)), false); err != nil {
		return 0, err
	}
	return w.memFile.ReadAt(p, off)
}

func (w *watchedFile) WriteAt(p []byte, off int64) (int, error) {
	if err := w.call("write", off, int64(len(p)), true); err != nil {
		return 0, err
	}
	return w.memFile.WriteAt(p, off)
}

func (w *watchedFile) Truncate(size int64) error {
	if err := w.call("truncate", size, 0, true); err != nil {
		return err
	}
	return w.memFile.Truncate(size)
}

func (w *watchedFile) PunchHole(off, n int64) error {
	if err := w.call("punch", off, n, true); err != nil {
		return err
	}
	return w.memFile.PunchHole(off, n)
}

// within runs fn, which may allocate so many bytes and must end.
func within(t *testing.T, memory uint64, fn func()) {
	t.Helper()
	// Work is bounded by counting calls of the file; this catches loops that make none.
	hang := time.AfterFunc(time.Minute, func() { panic("an operation hangs") })
	defer hang.Stop()
	before := allocated()
	fn()
	if n := allocated() - before; n > memory {
		t.Errorf("%d MiB were allocated, %d are justified", n>>20, memory>>20)
	}
}

// allocated returns the bytes allocated so far.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// rawFuzzFile is an image of any bytes.
func rawFuzzFile(b []byte) *memFile {
	f := newMemFile("raw")
	f.content.writeAt(bytes.Clone(b), 0)
	return f
}

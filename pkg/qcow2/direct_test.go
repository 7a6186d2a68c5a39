package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A file past the page cache is like another, whatever is asked for, alone or beside others, and however large its blocks are.
func TestDirectFile(t *testing.T) {
	for _, others := range []int32{0, 1} {
		for _, block := range []int64{512, 4096} {
			t.Run(fmt.Sprintf("%d others, blocks of %d", others, block), func(t *testing.T) {
				f := openDirectFile(t, block)
				f.inHand.Add(others)
				if _, err := OpenFile(f.Name(), true); !errors.Is(err, ErrInUse) {
					t.Errorf("opened a second time: %v", err)
				}
				useDirectFile(t, f)
				if made := len(f.submitters.idle); made != int(others) {
					t.Errorf("%d submitters", made)
				}
				must(t, f.Close())
				if _, err := f.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrClosed) {
					t.Errorf("write to a closed file: %v", err)
				}
			})
		}
	}
}

// openDirectFile makes an empty file, which is removed when the test ends. Its blocks may be larger than they need be.
func openDirectFile(t *testing.T, block int64) *directFile {
	t.Helper()
	path := filepath.Join(diskDir(t), "file")
	f, err := CreateFile(path)
	must(t, err)
	must(t, f.Close())
	f, err = OpenDirectFile(path)
	must(t, err)
	d, ok := f.(*directFile)
	if !ok {
		t.Fatalf("%T: no direct I/O", f)
	}
	d.block = max(d.block, block)
	return d
}

// useDirectFile compares reads and writes with those of memory.
func useDirectFile(t *testing.T, f *directFile) {
	t.Helper()
	model := newSparse()
	rng := rand.New(rand.NewPCG(1, 1))
	for range 400 {
		off, n := rng.Int64N(1<<20), 1+rng.Int64N(5000)
		switch rng.IntN(4) {
		case 0:
			off, n = off&^511, (n+511)&^511
		case 1:
			n = 300 << 10 // more than one buffer
		}
		p := stamp(int(off), off, n)
		if rng.IntN(2) == 0 {
			got, err := f.WriteAt(p, off)
			if int64(got) != n || err != nil {
				t.Fatalf("write %d at %d: %d, %v", n, off, got, err)
			}
			model.writeAt(p, off)
			continue
		}
		got, err := f.ReadAt(p, off)
		size, sizeErr := f.Size()
		must(t, sizeErr)
		if want := max(0, min(n, size-off)); int64(got) != want || want < n != errors.Is(err, io.EOF) {
			t.Fatalf("read %d at %d of %d: %d, %v", n, off, size, got, err)
		}
		expected := make([]byte, got)
		model.readAt(expected, off)
		if i := difference(p[:got], expected); i >= 0 {
			t.Fatalf("read %d at %d: byte %d differs", n, off, i)
		}
	}
}

// Writes at the same time end up where they belong. What the kernel does not take fails as any other write does, and where it
// takes none that way they go the usual way.
func TestSubmittedWrites(t *testing.T) {
	f := openDirectFile(t, 512)
	defer f.Close()
	const writers, each, block = 16, 64, 4096
	write := func(i int64) {
		for k := range int64(each) {
			off := (k*writers + i) * block
			if n, err := f.WriteAt(stamp(int(i), off, block), off); n != block || err != nil {
				t.Errorf("write at %d: %d, %v", off, n, err)
			}
		}
	}
	check := func() {
		t.Helper()
		p := make([]byte, block)
		for off := int64(0); off < writers*each*block; off += block {
			_, err := f.ReadAt(p, off)
			must(t, err)
			if i := difference(p, stamp(int(off/block%writers), off, block)); i >= 0 {
				t.Fatalf("block at %d: byte %d differs", off, i)
			}
		}
	}
	var all sync.WaitGroup
	for i := range int64(writers) {
		all.Go(func() { write(i) })
	}
	all.Wait()
	check()
	if made := len(f.submitters.idle); made < 2 || made > writers {
		t.Errorf("%d submitters for %d writers", made, writers)
	}

	f.inHand.Add(1)
	reader, err := os.Open(f.Name())
	must(t, err)
	defer reader.Close()
	refused := &directFile{osFile: &osFile{f: reader}, block: 512}
	refused.inHand.Add(1)
	if n, err := refused.WriteAt(alignedBuffer(block), 0); n != 0 || !errors.Is(err, unix.EBADF) {
		t.Errorf("write to a file that is open for reading: %d, %v", n, err)
	}
	refused.submitters.close()

	f.submitters.close()
	must(t, f.Truncate(0))
	for i := range int64(writers) {
		write(i)
	}
	check()
	if made := len(f.submitters.idle); made != 0 {
		t.Errorf("%d submitters where there can be none", made)
	}
}

// A guest writes sectors where the file is written in larger blocks: what it writes beside them at that time stays.
func TestPartsOfBlocks(t *testing.T) {
	const block, sector, blocks, rounds = 4096, 512, 8, 200
	f := openDirectFile(t, block)
	must(t, Create(f, 1<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	defer checkSound(t, f.Name())
	defer img.Close()
	_, err = img.WriteAt(make([]byte, blocks*block), 0)
	must(t, err)
	var d Direct
	if _, ok := img.StartDirect(&d, sector, sector, false); ok {
		t.Fatal("a part of a block is direct")
	}
	var all sync.WaitGroup
	for b := range int64(blocks) {
		all.Go(func() {
			for i := range rounds {
				if _, err := img.WriteAt(stamp(i, b, sector), b*block); err != nil {
					t.Error(err)
				}
			}
		})
		all.Go(func() {
			got := make([]byte, block-sector)
			for i := range rounds {
				p := alignedBuffer(block)
				copy(p, stamp(i, b, block))
				if err := writeDirect(img, p, b*block); err != nil {
					t.Error(err)
				}
				if _, err := img.ReadAt(got, b*block+sector); err != nil {
					t.Error(err)
				}
				if at := difference(got, p[sector:]); at >= 0 {
					t.Errorf("block %d, round %d: byte %d of what was written is gone", b, i, sector+at)
					return
				}
			}
		})
	}
	all.Wait()
}

// writeDirect writes as the event loop does.
func writeDirect(img *Image, p []byte, off int64) error {
	var d Direct
	host, ok := img.StartDirect(&d, off, int64(len(p)), true)
	if !ok {
		_, err := img.WriteAt(p, off)
		return err
	}
	defer img.EndDirect(&d, true)
	fd, _ := img.DirectFD()
	_, err := unix.Pwrite(fd, p, host)
	return err
}

// Clusters that share a block would mix.
func TestBlocksLargerThanClusters(t *testing.T) {
	f := openDirectFile(t, 4096)
	defer f.Close()
	must(t, Create(f, 1<<20, CreateOptions{ClusterSize: 2048}))
	if _, err := Open(f, OpenOptions{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("opened: %v", err)
	}
}

// diskDir is a directory on a file system that does direct I/O, which a temporary one in memory does not.
func diskDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "direct")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestStartDirect(t *testing.T) {
	f := newMemFile("direct")
	const size, cluster = 1 << 20, 64 << 10
	must(t, Create(f, size, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	data := stamp(1, 0, 4*cluster)
	_, err = img.WriteAt(data, 0)
	must(t, err)
	var d, other Direct
	refused := func(what string, off, n int64, write bool) {
		t.Helper()
		if _, ok := img.StartDirect(&other, off, n, write); ok {
			t.Errorf("%s: begun", what)
			img.EndDirect(&other, write)
		}
	}
	started := func(off, n int64, write bool) (host int64) {
		t.Helper()
		host, ok := img.StartDirect(&d, off, n, write)
		if !ok {
			t.Fatalf("%d bytes at %d: not begun", n, off)
		}
		return host
	}
	host := started(cluster/2, 2*cluster, false)
	got := make([]byte, 2*cluster)
	_, err = f.ReadAt(got, host)
	must(t, err)
	if !bytes.Equal(got, data[cluster/2:][:2*cluster]) {
		t.Error("the run is somewhere else")
	}
	// It is as any other request: what must stop it waits.
	if img.gate.TryLock() {
		t.Fatal("a freeze would not wait for it")
	}
	r := guestRange{1, 2, true}
	if img.guests.tryLock(&r) {
		t.Fatal("a change of the mapping would not wait for it")
	}
	img.EndDirect(&d, false)
	if !img.guests.tryLock(&r) {
		t.Fatal("its clusters are still in use")
	}
	refused("the mapping is being changed", cluster, 512, false)
	img.guests.unlock(&r)

	host = started(0, 4096, true)
	p := stamp(2, 0, 4096)
	_, err = f.WriteAt(p, host)
	must(t, err)
	img.f.dirty.Store(false)
	img.EndDirect(&d, true)
	if !img.f.dirty.Load() {
		t.Error("a flush would not sync it")
	}
	if host := started(8*cluster, 512, false); host >= 0 {
		t.Errorf("what is not mapped is read at %d", host)
	}
	img.EndDirect(&d, false)
	refused("not mapped", 8*cluster, 512, true)
	refused("into what is unmapped", 3*cluster, 2*cluster, false)
	refused("behind the end", size, 512, false)
	refused("a negative offset", -512, 512, false)
	refused("too long", 0, size+512, false)
	if n := testing.AllocsPerRun(100, func() {
		_, ok := img.StartDirect(&d, 0, 4096, true)
		if ok {
			img.EndDirect(&d, true)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	_, err = img.CreateSnapshot("s", nil)
	must(t, err)
	must(t, err)
	_, err = img.ReadAt(got, 0) // the table is new
	must(t, err)
	started(0, cluster, false)
	img.EndDirect(&d, false)
	refused("shared with a snapshot", 0, 512, true)
	must(t, img.Discard(0, cluster))
	if host := started(0, cluster, false); host >= 0 {
		t.Errorf("what was discarded is read at %d", host)
	}
	img.EndDirect(&d, false)
	refused("half discarded", 0, 2*cluster, false)
	must(t, img.Close())
	refused("closed", cluster, 512, false)
}

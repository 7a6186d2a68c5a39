package qcow2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
	"golang.org/x/sys/unix"
)

// openDirectFile makes an empty file, which is removed when the test ends. Its blocks may be larger than they need be.
func openDirectFile(t *testing.T, block int64) *host.DirectFile {
	t.Helper()
	path := filepath.Join(diskDir(t), "file")
	f, err := CreateFile(path)
	must(t, err)
	must(t, f.Close())
	f, err = OpenDirectFile(path)
	must(t, err)
	d, ok := f.(*host.DirectFile)
	if !ok {
		t.Fatalf("%T: no direct I/O", f)
	}
	d.Block = max(d.Block, block)
	return d
}

// A guest writes sectors where the file is written in larger blocks: what it writes beside them at that time stays.
func TestPartsOfBlocks(t *testing.T) {
	const block, sector, blocks, rounds = 4096, 512, 8, 200
	f := openDirectFile(t, block)
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
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
				p := host.AlignedBuffer(block)
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
	at, ok := img.StartDirect(&d, off, int64(len(p)), true)
	if !ok {
		_, err := img.WriteAt(p, off)
		return err
	}
	defer img.EndDirect(&d, true)
	fd, _ := img.DirectFD()
	_, err := unix.Pwrite(fd, p, at)
	return err
}

// Clusters that share a block would mix.
func TestBlocksLargerThanClusters(t *testing.T) {
	f := openDirectFile(t, 4096)
	defer f.Close()
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{ClusterSize: 2048}))
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
	must(t, Create(t.Context(), f, size, CreateOptions{}))
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
	started := func(off, n int64, write bool) (at int64) {
		t.Helper()
		at, ok := img.StartDirect(&d, off, n, write)
		if !ok {
			t.Fatalf("%d bytes at %d: not begun", n, off)
		}
		return at
	}
	at := started(cluster/2, 2*cluster, false)
	got := make([]byte, 2*cluster)
	_, err = f.ReadAt(got, at)
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

	at = started(0, 4096, true)
	p := stamp(2, 0, 4096)
	_, err = f.WriteAt(p, at)
	must(t, err)
	must(t, img.f.Sync())
	img.EndDirect(&d, true)
	if syncsOf(f, func() { must(t, img.f.Sync()) }) != 1 {
		t.Error("a flush would not sync it")
	}
	if at := started(8*cluster, 512, false); at >= 0 {
		t.Errorf("what is not mapped is read at %d", at)
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
	_, err = img.CreateSnapshot(t.Context(), "s", nil)
	must(t, err)
	must(t, err)
	_, err = img.ReadAt(got, 0) // the table is new
	must(t, err)
	started(0, cluster, false)
	img.EndDirect(&d, false)
	refused("shared with a snapshot", 0, 512, true)
	must(t, img.Discard(0, cluster))
	if at := started(0, cluster, false); at >= 0 {
		t.Errorf("what was discarded is read at %d", at)
	}
	img.EndDirect(&d, false)
	refused("half discarded", 0, 2*cluster, false)
	must(t, img.Close())
	refused("closed", cluster, 512, false)
}

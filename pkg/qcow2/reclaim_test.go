package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// leakyImage returns an image as an engine leaves it that dies: with clusters reserved, with clusters that guests have
// given up and that are still counted, and with a snapshot.
func leakyImage(t *testing.T, o CreateOptions, size int64) *memFile {
	t.Helper()
	f := newMemFile("leaky")
	must(t, Create(t.Context(), f, size, o))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	for off := int64(0); off < size; off += 8 * img.ClusterSize() {
		_, err = img.WriteAt(stamp(1, off, 4*img.ClusterSize()), off)
		must(t, err)
	}
	_, err = img.CreateSnapshot(t.Context(), "old", nil)
	must(t, err)
	must(t, img.alloc.endReservation())
	for off := int64(0); off < size/2; off += 16 * img.ClusterSize() {
		_, err = img.WriteAt(stamp(2, off, img.ClusterSize()), off)
		must(t, err)
	}
	must(t, img.Flush())
	dead := f.clone() // lowered counts are not yet written
	must(t, img.Close())
	return dead
}

// TestReclaimLeaks finds all leaks of a volume that nobody uses meanwhile.
func TestReclaimLeaks(t *testing.T) {
	for _, o := range []CreateOptions{{ClusterSize: 512}, {ClusterSize: 4096, RefcountBits: 64}, {ClusterSize: 64 << 10, RefcountBits: 2}, {ClusterSize: 512, Version: 2}} {
		t.Run(fmt.Sprint(o), func(t *testing.T) {
			f := leakyImage(t, o, 256*o.ClusterSize)
			before, err := checkFile(t.Context(), f)
			must(t, err)
			if before.Leaks == 0 || before.Corruptions != 0 {
				t.Fatalf("the image has no leaks to begin with: %+v", before)
			}
			content := readable(t, f)
			img, err := Open(f, OpenOptions{})
			must(t, err)
			r, err := img.ReclaimLeaks(t.Context())
			must(t, err)
			if r.Clusters+r.Lowered != before.Leaks || r.Clusters == 0 || r.Lowered == 0 || !r.Complete {
				t.Errorf("got %+v of %d leaks", r, before.Leaks)
			}
			must(t, img.Close())
			after, err := checkFile(t.Context(), f.reopen())
			if err != nil || after.ExitStatus() != 0 {
				t.Errorf("%+v, %v", after, err)
			}
			path := tempImage(t)
			f.save(t, path)
			if q := runQemuCheck(t, path); q.exit != 0 {
				t.Error(q.output)
			}
			if diff := content.changed(t, f); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestOnlineReclaimLeaks searches while guests write, discard and flush, and snapshots come and go: nobody loses
// anything, and in the end no leak is left.
func TestOnlineReclaimLeaks(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			const cluster, size, guests = 512, 512 << 10, 4
			f := leakyImage(t, CreateOptions{ClusterSize: cluster}, size)
			old := readable(t, f)["snapshot 1"]
			f.setFault(func(c fileCall) error {
				if c.kind == callRead {
					runtime.Gosched()
				}
				return nil
			})
			img, err := Open(f, OpenOptions{L2CacheSize: 8 << 10})
			must(t, err)

			ctx, stop := context.WithCancel(t.Context())
			var running sync.WaitGroup
			end := func() {
				stop()
				running.Wait()
			}
			defer end() // also of a test that fails
			disk := make([]byte, size)
			_, err = img.ReadAt(disk, 0)
			must(t, err)
			for g := range int64(guests) {
				part := disk[g*size/guests : (g+1)*size/guests]
				running.Go(func() { guest(ctx, t, img, g*size/guests, part, rand.New(rand.NewPCG(seed, uint64(g)))) })
			}
			running.Go(func() {
				for i := 0; ctx.Err() == nil && i < 6; i++ {
					name := fmt.Sprint("s", i)
					if _, err := img.CreateSnapshot(t.Context(), name, nil); err != nil {
						t.Error(err)
					}
					if err := img.DeleteSnapshot(t.Context(), ByName(name)); err != nil {
						t.Error(err)
					}
				}
			})
			for range 12 {
				r, err := img.ReclaimLeaks(ctx)
				must(t, err)
				t.Logf("%+v", r)
			}
			end()

			r, err := img.ReclaimLeaks(t.Context())
			must(t, err)
			if !r.Complete {
				t.Errorf("nobody is in the way, but: %+v", r)
			}
			got := make([]byte, size)
			_, err = img.ReadAt(got, 0)
			must(t, err)
			if !bytes.Equal(got, disk) {
				t.Errorf("the disk is wrong at %#x", difference(got, disk))
			}
			must(t, img.Close())
			c, err := checkFile(t.Context(), f.reopen())
			if err != nil || c.ExitStatus() != 0 {
				t.Errorf("%+v, %v", c, err)
			}
			if diff := (content{"snapshot 1": old}).changed(t, f); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// heldRead is a file that holds up a read at an offset: before it is made, or when it has been.
type heldRead struct {
	*memFile
	at            int64
	behind        bool
	reads         atomic.Int32 // at is read so often until the one that is held up
	held, release chan struct{}
}

func (f *heldRead) ReadAt(p []byte, off int64) (n int, err error) {
	if f.behind {
		n, err = f.memFile.ReadAt(p, off)
	}
	if off == f.at && f.reads.Add(-1) == 0 {
		close(f.held)
		<-f.release
	}
	if !f.behind {
		n, err = f.memFile.ReadAt(p, off)
	}
	return n, err
}

func contentOf(t *testing.T, f File, size int64) []byte {
	t.Helper()
	img, err := Open(f, OpenOptions{ReadOnly: true})
	must(t, err)
	p := make([]byte, size)
	_, err = img.ReadAt(p, 0)
	must(t, errors.Join(err, img.Close()))
	return p
}

// TestWritesPassASearch holds a search up while it reads a table of the disk: a write to another one passes, one to the same table
// waits for the read only, and what both take is not given back.
func TestWritesPassASearch(t *testing.T) {
	const cluster, size = 512, 128 << 10
	const coverage = cluster / 8 * cluster // of an L2 table
	for _, behind := range []bool{false, true} {
		for table := range int64(size / coverage) {
			t.Run(fmt.Sprintf("table %d, held up behind the read %v", table, behind), func(t *testing.T) {
				f := &heldRead{memFile: leakyImage(t, CreateOptions{ClusterSize: cluster}, size), behind: behind, held: make(chan struct{}), release: make(chan struct{})}
				disk := contentOf(t, f.clone(), size)
				img, err := Open(f, OpenOptions{})
				must(t, err)
				f.at = int64(img.l1[table].Offset())
				f.reads.Store(1)
				if !img.l1[table].Copied() { // the snapshot's table, which is read first
					f.reads.Store(2)
				}
				write := func(off int64) *event {
					e := &event{done: make(chan struct{})}
					data := stamp(3, off, 4*cluster)
					copy(disk[off:], data)
					go func() {
						defer close(e.done)
						_, e.err = img.WriteAt(data, off)
					}()
					e.settle()
					return e
				}
				other := (table + 1) % (size / coverage)
				<-write(other * coverage).done // what comes first reserves

				var r Reclaimed
				search := &event{done: make(chan struct{})}
				go func() {
					defer close(search.done)
					r, search.err = img.ReclaimLeaks(t.Context())
				}()
				<-f.held
				passes, waits := write(other*coverage+10*cluster), write(table*coverage+2*cluster)
				select {
				case <-passes.done:
				default:
					t.Error("a write waits for the read of another table")
				}
				close(f.release)
				for _, e := range []*event{passes, waits, search} {
					<-e.done
					must(t, e.err)
				}
				if r.Clusters == 0 {
					t.Error("no leaks were found")
				}
				got := make([]byte, size)
				_, err = img.ReadAt(got, 0)
				must(t, err)
				if !bytes.Equal(got, disk) {
					t.Errorf("the disk is wrong at %#x", difference(got, disk))
				}
				must(t, img.Close())
				if c, err := checkFile(t.Context(), f.reopen()); err != nil || c.Corruptions != 0 {
					t.Errorf("%+v, %v", c, err)
				}
			})
		}
	}
}

// guest uses its part of the disk, which begins at start, until ctx ends; part is what it holds.
func guest(ctx context.Context, t *testing.T, img *Image, start int64, part []byte, rng *rand.Rand) {
	for i := 0; ctx.Err() == nil; i++ {
		at := rng.Int64N(int64(len(part))/format.SectorSize) * format.SectorSize
		n := min((1+rng.Int64N(16))*format.SectorSize, int64(len(part))-at)
		var err error
		switch rng.IntN(5) {
		case 0:
			err = img.Discard(start+at, n)
			clear(part[at : at+n])
		case 1:
			err = img.Flush()
		default:
			b := stamp(i, start+at, n)
			copy(part[at:], b)
			_, err = img.WriteAt(b, start+at)
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// TestReclaimLeaksEnds with its context, and gives back nothing in an image that it does not understand.
func TestReclaimLeaksEnds(t *testing.T) {
	img, err := Open(leakyImage(t, CreateOptions{ClusterSize: 512}, 128<<10), OpenOptions{})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := img.ReclaimLeaks(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	must(t, img.Close())
	if _, err := img.ReclaimLeaks(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}

	f := hostileImage(t, 3)
	put64(f, l2At(f), get64(f, l2At(f))|2)
	img, err = Open(f, OpenOptions{})
	must(t, err)
	if r, err := img.ReclaimLeaks(t.Context()); !errors.Is(err, ErrCorrupt) || r.Clusters != 0 {
		t.Errorf("got %+v, %v", r, err)
	}
	must(t, img.Close())
}

package qcow2

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// TestConcurrency lets many goroutines use regions of their own, which share clusters and L2 tables at their borders,
// while snapshots come and go, views of them are read and the image is checked. Under -race.
func TestConcurrency(t *testing.T) {
	for _, o := range []CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {ClusterSize: 64 << 10}, {ClusterSize: 64 << 10, ExtendedL2: true},
	} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			t.Parallel()
			const workers, region, requests = 8, 50_000, 250 // no multiple of any cluster or sector
			f := newMemFile("concurrency")
			must(t, Create(f, workers*region, o))
			img, err := Open(f, OpenOptions{L2CacheSize: 2048})
			must(t, err)

			final := newSparse()
			final.size = img.Size()
			var mu sync.Mutex // guards final
			var guests, others sync.WaitGroup
			var done atomic.Bool
			for w := range workers {
				guests.Go(func() {
					mine := newSparse()
					if err := useRegion(img, mine, int64(w)*region, region, requests, w); err != nil {
						t.Errorf("region %d: %v", w, err)
					}
					p := make([]byte, region)
					mine.readAt(p, 0)
					mu.Lock()
					defer mu.Unlock()
					final.writeAt(p, int64(w)*region)
				})
			}
			others.Go(func() {
				for i := 0; !done.Load() || i < 3; i++ {
					if err := takeAndDrop(img, i); err != nil {
						t.Errorf("snapshot %d: %v", i, err)
						return
					}
				}
			})
			others.Go(func() {
				for !done.Load() {
					if r, err := img.Check(t.Context(), nil); err != nil || r.ExitStatus() != 0 {
						t.Errorf("our check: %+v, %v", r, err)
						return
					}
				}
			})
			guests.Wait()
			done.Store(true)
			others.Wait()

			h := &history{t: t, img: img}
			h.model.active = final
			h.verifyView("the active disk", img.Active(), final)
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("our check: %+v, %v", r, err)
			}
			path := tempImage(t)
			f.save(t, path)
			if c := runQemuCheck(t, path); c.exit != 0 {
				t.Errorf("qemu-img check: %s", c.output)
			}
			qemuReads(t, path, "", final, final.size)
		})
	}
}

// useRegion makes random requests to size bytes at base, of which mine keeps the content.
func useRegion(img *Image, mine *sparse, base, size int64, requests, worker int) error {
	rng := rand.New(rand.NewPCG(uint64(worker), 5))
	for i := range requests {
		off := rng.Int64N(size)
		n := min(size-off, 1+rng.Int64N(6000))
		var err error
		switch rng.IntN(10) {
		case 0:
			err = img.Flush()
		case 1:
			err = img.WriteZeroes(base+off, n)
			mine.zero(off, n)
		case 2:
			err = img.Discard(base+off, n)
			mine.zero(off, n)
		case 3, 4, 5:
			got, want := make([]byte, n), make([]byte, n)
			_, err = img.ReadAt(got, base+off)
			mine.readAt(want, off)
			if at := difference(got, want); err == nil && at >= 0 {
				err = fmt.Errorf("request %d: %#x at %#x, want %#x", i, got[at], off+int64(at), want[at])
			}
		default:
			p := stamp(worker*1000+i, off, n)
			_, err = img.WriteAt(p, base+off)
			mine.writeAt(p, off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// takeAndDrop takes a snapshot, reads it twice while the guests go on, the same both times, and deletes it.
func takeAndDrop(img *Image, i int) error {
	name := fmt.Sprint("snapshot ", i)
	if _, err := img.CreateSnapshot(name, nil); err != nil {
		return err
	}
	v, err := img.OpenSnapshot(ByName(name))
	if err != nil {
		return err
	}
	first, second := make([]byte, v.Size()), make([]byte, v.Size())
	for _, p := range [][]byte{first, second} {
		if _, err := v.ReadAt(p, 0); err != nil {
			return err
		}
		if err := img.Flush(); err != nil {
			return err
		}
	}
	if at := difference(first, second); at >= 0 {
		return fmt.Errorf("it changed at %#x", at)
	}
	if err := v.Close(); err != nil {
		return err
	}
	return img.DeleteSnapshot(ByName(name))
}

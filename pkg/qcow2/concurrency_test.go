package qcow2

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestConcurrency lets many goroutines use regions of their own, which share clusters and L2 tables at their borders,
// while snapshots come and go, views of them are read and the image is checked. Under -race. On some disks each call takes its
// time, and now and then the file cannot become longer.
func TestConcurrency(t *testing.T) {
	for _, o := range []CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {ClusterSize: 64 << 10}, {ClusterSize: 64 << 10, ExtendedL2: true},
	} {
		for name, full := range map[string]bool{"well": false, "slow and full": true} {
			t.Run(fmt.Sprintf("%+v, %s", o, name), func(t *testing.T) {
				t.Parallel()
				testConcurrency(t, o, *concurrentRequests, full)
			})
		}
	}
}

var concurrentRequests = flag.Int("concurrent-requests", 250, "requests of each of the goroutines in TestConcurrency")

func beSlowAndFull(f *memFile) {
	f.between = func() {
		if rand.IntN(4) == 0 {
			<-time.After(time.Duration(rand.IntN(200)) * time.Microsecond)
		}
	}
	f.setFault(func(c fileCall) error {
		if (c.kind == callTruncate || c.kind == callWrite) && c.off+c.n > f.content.size && rand.IntN(10) == 0 {
			return ErrNoSpace
		}
		return nil
	})
}

// whenSpace repeats what meets a full disk.
func whenSpace(do func() error) error {
	for {
		if err := do(); !errors.Is(err, ErrNoSpace) {
			return err
		}
	}
}

func testConcurrency(t *testing.T, o CreateOptions, requests int, full bool) {
	const workers, region = 8, 50_000 // no multiple of any cluster or sector
	f := newMemFile("concurrency")
	must(t, Create(t.Context(), f, workers*region, o))
	img, err := Open(f, OpenOptions{L2CacheSize: 2048})
	must(t, err)
	if full {
		beSlowAndFull(f)
	}

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
			if err := takeAndDrop(t.Context(), img, i); err != nil {
				t.Errorf("snapshot %d: %v", i, err)
				return
			}
		}
	})
	others.Go(func() {
		for !done.Load() {
			var r CheckResult
			err := whenSpace(func() (err error) {
				r, err = img.Check(t.Context(), nil)
				return err
			})
			if err != nil || r.Corruptions != 0 {
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
	f.between = nil
	f.setFault(nil)
	must(t, img.Close())
	f = f.reopen()
	if full {
		// A deletion that found no room again and again leaves leaks, and nothing else.
		if r := repairFile(t, f, RepairLeaks); r.Found.Corruptions != 0 {
			t.Errorf("our check: %+v", r.Found)
		}
	}
	checkSaved(t, f)
	path := tempImage(t)
	f.save(t, path)
	qemuReads(t, path, "", final, final.size)
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
			err = whenSpace(img.Flush)
		case 1:
			err = whenSpace(func() error { return img.WriteZeroes(base+off, n) })
			mine.zero(off, n)
		case 2:
			err = whenSpace(func() error { return img.Discard(base+off, n) })
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
			err = whenSpace(func() error {
				_, err := img.WriteAt(p, base+off)
				return err
			})
			mine.writeAt(p, off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// takeAndDrop takes a snapshot, reads it twice while the guests go on, the same both times, and deletes it.
func takeAndDrop(ctx context.Context, img *Image, i int) error {
	name := fmt.Sprint("snapshot ", i)
	if err := whenSpace(func() error {
		_, err := img.CreateSnapshot(ctx, name, nil)
		return err
	}); err != nil {
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
		if err := whenSpace(img.Flush); err != nil {
			return err
		}
	}
	if at := difference(first, second); at >= 0 {
		return fmt.Errorf("it changed at %#x", at)
	}
	if err := v.Close(); err != nil {
		return err
	}
	return whenSpace(func() error { return img.DeleteSnapshot(ctx, ByName(name)) })
}

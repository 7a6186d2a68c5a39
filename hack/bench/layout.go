package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// imageLayout is what an image is made with. Extended L2 tables map a 32nd of a cluster each.
type imageLayout struct {
	cluster  int64
	extended bool
}

func (l imageLayout) String() string {
	s := fmt.Sprintf("%d KiB", l.cluster>>10)
	if l.extended {
		s += fmt.Sprintf(", subclusters of %d KiB", l.cluster>>15)
	}
	return s
}

func (l imageLayout) options() string {
	ext := "off"
	if l.extended {
		ext = "on"
	}
	return fmt.Sprintf("cluster_size=%d,extended_l2=%s", l.cluster, ext)
}

// metadata returns how many bytes of L2 tables and 16-bit reference counts a TiB of data has.
func (l imageLayout) metadata() int64 {
	entry := int64(8)
	if l.extended {
		entry = 16
	}
	return 1 << 40 / l.cluster * (entry + 2)
}

// layout compares layouts of images, each with QEMU's use of the same: an empty disk is filled, 1 MiB after the other, 4 at
// a time; written at random places, 4 KiB each, 8 at a time, before a snapshot and right after it; and filled again.
func (b *bench) layout(ctx context.Context) error {
	const size = 2 << 30
	table("layout", "ours", "QEMU", "times better")
	for _, l := range []imageLayout{
		{16 << 10, false}, {64 << 10, false}, {64 << 10, true}, {128 << 10, true}, {256 << 10, false}, {1 << 20, true},
	} {
		var figures [2][5][]float64
		for range min(b.pairs, 3) {
			for who, serve := range []func(context.Context, string) (*served, error){serveOurs, b.serveQEMU} {
				path := filepath.Join(b.dir, "layout.qcow2")
				if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", l.options(), path, fmt.Sprint(size)); err != nil {
					return err
				}
				s, err := serve(ctx, path)
				if err != nil {
					return err
				}
				got, err := layoutFigures(ctx, s, size, b.load)
				if err := errors.Join(err, s.close()); err != nil {
					return err
				}
				for i, f := range got {
					figures[who][i] = append(figures[who][i], f)
				}
				if err := os.Remove(path); err != nil {
					return err
				}
			}
		}
		for i, f := range []struct {
			name, unit string
			large      bool
		}{
			{"1M writes, allocating", "MiB/s", true},
			{"random 4K writes", "1/s", true},
			{"snapshot", "ms", false},
			{"random 4K writes after it", "1/s", true},
			{"1M writes after it", "MiB/s", true},
		} {
			x := row{Part: "layout", Unit: f.unit, Name: fmt.Sprintf("%s: %s, %s", l, f.name, f.unit)}
			x.Ours, x.QEMU = medianFloat(figures[0][i]), medianFloat(figures[1][i])
			b.report.add(x, f.large)
		}
		fmt.Printf("| %s: metadata per TiB, MiB | %s | | |\n", l, number(float64(l.metadata())/(1<<20)))
	}
	return nil
}

// layoutFigures returns the figures of layout in the order of its rows.
func layoutFigures(ctx context.Context, s *served, size int64, load time.Duration) (f [5]float64, err error) {
	random := func() (float64, error) {
		return writers(ctx, s, 8, guestBlock, func(rng *rand.Rand, _ int64, since time.Duration) (int64, bool) {
			return rng.Int64N(size/guestBlock) * guestBlock, since < load
		})
	}
	fill := func() (float64, error) {
		return writers(ctx, s, 4, 1<<20, func(_ *rand.Rand, i int64, _ time.Duration) (int64, bool) { return i << 20, i<<20 < size })
	}
	snapshot := func() (float64, error) {
		start := time.Now()
		err := s.create()
		return milliseconds(time.Since(start)), err
	}
	for i, step := range []func() (float64, error){fill, random, snapshot, random, fill} {
		if f[i], err = step(); err != nil {
			return f, err
		}
	}
	return f, nil
}

// writers returns how many writes of so many bytes a second n writers get done, a flush at the end included. next says where
// write i goes, or that there is none.
func writers(ctx context.Context, t target, n int, bytes int64, next func(rng *rand.Rand, i int64, since time.Duration) (int64, bool)) (float64, error) {
	var all sync.WaitGroup
	var begun, done atomic.Int64
	errs := make([]error, n)
	start := time.Now()
	for w := range n {
		all.Go(func() {
			rng, p := rand.New(rand.NewPCG(5, uint64(w))), alignedBytes(bytes)
			for ctx.Err() == nil {
				off, ok := next(rng, begun.Add(1)-1, time.Since(start))
				if !ok {
					return
				}
				if _, errs[w] = t.WriteAt(p, off); errs[w] != nil {
					return
				}
				done.Add(1)
			}
		})
	}
	all.Wait()
	if err := errors.Join(errors.Join(errs...), ctx.Err(), t.Flush()); err != nil {
		return 0, err
	}
	return float64(done.Load()) / time.Since(start).Seconds(), nil
}

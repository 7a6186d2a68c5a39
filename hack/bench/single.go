package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// open compares the time and memory that it takes to open an image, a process's start included.
func (b *bench) open(ctx context.Context) error {
	table("open: `image info`, `qemu-img info`", "ours", "QEMU", "times less")
	for _, size := range b.sizes {
		path, err := b.mapped(ctx, size)
		if err != nil {
			return err
		}
		var times [2][]time.Duration
		var memory [2]int64
		for range b.pairs {
			for who, args := range [][]string{{b.program, "image", "info", path}, {"qemu-img", "info", path}} {
				cmd := exec.CommandContext(ctx, args[0], args[1:]...)
				start := time.Now()
				if out, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("%v: %w: %s", args, err, out)
				}
				times[who] = append(times[who], time.Since(start))
				if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
					memory[who] = max(memory[who], usage.Maxrss)
				}
			}
		}
		b.report.add(row{Part: "open", Name: size + ": ms", Unit: "ms", Ours: milliseconds(median(times[0])), QEMU: milliseconds(median(times[1]))}, false)
		b.report.add(row{Part: "open", Name: size + ": MiB", Unit: "MiB", Ours: float64(memory[0]) / 1024, QEMU: float64(memory[1]) / 1024}, false)
	}
	return nil
}

// fsync compares 4 KiB writes to clusters that have to be allocated, each followed by a flush.
func (b *bench) fsync(ctx context.Context) error {
	table("write and flush, allocating", "ours", "QEMU", "times better")
	const requests = 1000
	var rates [2][]time.Duration
	for range b.pairs {
		for who, serve := range []func(context.Context, string) (*served, error){serveOurs, b.serveQEMU} {
			path := filepath.Join(b.dir, "fsync.qcow2")
			if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, "16G"); err != nil {
				return err
			}
			s, err := serve(ctx, path)
			if err != nil {
				return err
			}
			d, err := writeAndFlush(s, requests)
			if e := s.close(); err == nil {
				err = e
			}
			if err != nil {
				return err
			}
			rates[who] = append(rates[who], d)
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	perSecond := func(ds []time.Duration) float64 { return requests / median(ds).Seconds() }
	b.report.add(row{Part: "fsync", Name: "per second", Unit: "1/s", Ours: perSecond(rates[0]), QEMU: perSecond(rates[1])}, true)
	return nil
}

// writeAndFlush writes to a different cluster each time.
func writeAndFlush(t target, requests int) (time.Duration, error) {
	const size, cluster = 16 << 30, 64 << 10
	places := rand.New(rand.NewPCG(1, 2)).Perm(size / cluster)[:requests]
	p := alignedBlock()
	start := time.Now()
	for _, at := range places {
		if _, err := t.WriteAt(p, int64(at)*cluster); err != nil {
			return 0, err
		}
		if err := t.Flush(); err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}

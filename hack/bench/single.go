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

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
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
		for who, serve := range []func(string) (*served, error){serveOurs, func(path string) (*served, error) { return serveQEMU(ctx, b.dir, path) }} {
			path := filepath.Join(b.dir, "fsync.qcow2")
			if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, "16G"); err != nil {
				return err
			}
			s, err := serve(path)
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

// restore compares how long it takes to make a volume out of a snapshot, by copying, for the host's file system may share
// no blocks.
func (b *bench) restore(ctx context.Context) error {
	table("restore of a snapshot", "ours ms", "QEMU ms", "times faster")
	for _, data := range []int64{256 << 20, 1 << 30} {
		source := filepath.Join(b.dir, "source.qcow2")
		if err := b.filled(ctx, source, data); err != nil {
			return err
		}
		var times [2][]time.Duration
		for range min(b.pairs, 3) {
			for who := range 2 {
				dst := filepath.Join(b.dir, "restored.qcow2")
				start := time.Now()
				var err error
				if who == 0 {
					err = clone(ctx, source, dst)
				} else {
					_, err = command(ctx, "qemu-img", "convert", "-l", "snap", "-O", "qcow2", source, dst)
				}
				if err == nil {
					_, err = command(ctx, "sync", dst)
				}
				if err != nil {
					return err
				}
				times[who] = append(times[who], time.Since(start))
				if err := os.Remove(dst); err != nil {
					return err
				}
			}
		}
		b.report.add(row{Part: "restore", Name: fmt.Sprintf("%d MiB of data", data>>20), Unit: "ms", Ours: milliseconds(median(times[0])), QEMU: milliseconds(median(times[1]))}, false)
		if err := os.Remove(source); err != nil {
			return err
		}
	}
	return nil
}

// filled makes an image of 16 GiB with so many bytes of data and the snapshot "snap".
func (b *bench) filled(ctx context.Context, path string, data int64) error {
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, "16G"); err != nil {
		return err
	}
	s, err := serveOurs(path)
	if err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < data && err == nil; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(off>>20) + byte(i)
		}
		_, err = s.WriteAt(p, off)
	}
	if e := s.close(); err == nil {
		err = e
	}
	if err == nil {
		_, err = command(ctx, b.program, "image", "snapshot", "create", path, "snap")
	}
	return err
}

func clone(ctx context.Context, source, dst string) error {
	f, err := qcow2.OpenFile(source, true)
	if err != nil {
		return err
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer img.Close()
	v, err := img.OpenSnapshot(qcow2.ByName("snap"))
	if err != nil {
		return err
	}
	defer v.Close()
	out, err := qcow2.CreateFile(dst)
	if err != nil {
		return err
	}
	if err := qcow2.Clone(ctx, out, v, 0, nil); err != nil {
		return err
	}
	return out.Close()
}

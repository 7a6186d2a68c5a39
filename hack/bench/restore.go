package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// restore compares how long it takes to make a volume out of a snapshot: where the host's file system can share blocks,
// and where it has to copy.
func (b *bench) restore(ctx context.Context) error {
	table("restore of a snapshot", "ours ms", "QEMU ms", "times faster")
	for _, data := range []int64{256 << 20, 1 << 30} {
		if err := b.restoreCopying(ctx, data); err != nil {
			return err
		}
	}
	for _, fs := range []struct {
		name string
		mkfs []string
	}{
		{"XFS", []string{"mkfs.xfs", "-q", "-m", "reflink=1"}},
		{"btrfs", []string{"mkfs.btrfs", "-q"}},
	} {
		if err := b.restoreSharing(ctx, fs.name, fs.mkfs); err != nil {
			return fmt.Errorf("on %s: %w", fs.name, err)
		}
	}
	return nil
}

// restoreCopying is for a disk of 16 GiB with so many bytes of data.
func (b *bench) restoreCopying(ctx context.Context, data int64) error {
	source := filepath.Join(b.dir, "source.qcow2")
	if err := b.filled(ctx, source, data); err != nil {
		return err
	}
	var times [2][]time.Duration
	for range min(b.pairs, 3) {
		for who := range 2 {
			d, err := b.restoreOnce(ctx, source, func(dst string) error {
				if who == 0 {
					return cloneSnapshot(ctx, source, dst)
				}
				_, err := command(ctx, "qemu-img", "convert", "-l", "snap", "-O", "qcow2", source, dst)
				return err
			})
			if err != nil {
				return err
			}
			times[who] = append(times[who], d)
		}
	}
	b.report.add(row{
		Part: "restore", Name: fmt.Sprintf("copying %d MiB of data", data>>20), Unit: "ms",
		Ours: milliseconds(median(times[0])), QEMU: milliseconds(median(times[1])),
	}, false)
	return os.Remove(source)
}

// restoreOnce returns how long it takes to restore a snapshot durably, and removes what came of it.
func (b *bench) restoreOnce(ctx context.Context, source string, restore func(dst string) error) (time.Duration, error) {
	dst := filepath.Join(filepath.Dir(source), "restored.qcow2")
	start := time.Now()
	err := restore(dst)
	if err == nil {
		_, err = command(ctx, "sync", dst)
	}
	took := time.Since(start)
	if err == nil {
		_, err = command(ctx, "qemu-img", "check", "-q", dst)
	}
	return took, errors.Join(err, os.Remove(dst))
}

// restoreSharing measures on a file system of its own that can share blocks. QEMU's tools cannot, so nothing is compared.
func (b *bench) restoreSharing(ctx context.Context, name string, mkfs []string) (err error) {
	device, dir := filepath.Join(b.dir, name), filepath.Join(b.dir, name+"-mounted")
	if err := errors.Join(os.WriteFile(device, nil, 0o600), os.Truncate(device, 400<<30), os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	if _, err := command(ctx, mkfs[0], append(mkfs[1:], device)...); err != nil {
		return err
	}
	if _, err := command(ctx, "mount", "-o", "loop", device, dir); err != nil {
		return err
	}
	defer func() {
		_, e := command(context.WithoutCancel(ctx), "umount", dir)
		err = errors.Join(err, e, os.Remove(device))
	}()

	source := filepath.Join(dir, "source.qcow2")
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", source, "100G"); err != nil {
		return err
	}
	if err := b.sharing(ctx, name+", 100 GiB in one piece", source); err != nil {
		return err
	}
	if err := os.Remove(source); err != nil {
		return err
	}
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", source, "16G"); err != nil {
		return err
	}
	if err := scatter(source, 100_000); err != nil {
		return err
	}
	return b.sharing(ctx, name+", 100,000 random writes", source)
}

// scatter makes so many 4 KiB writes at random places of a disk of 16 GiB.
func scatter(path string, writes int) error {
	s, err := serveOurs(path)
	if err != nil {
		return err
	}
	rng, p := rand.New(rand.NewPCG(3, 4)), alignedBlock()
	for range writes {
		if _, err = s.WriteAt(p, rng.Int64N(16<<30/guestBlock)*guestBlock); err != nil {
			break
		}
	}
	return errors.Join(err, s.close())
}

// sharing restores a snapshot, first with nothing beside, then while its source's guest works.
func (b *bench) sharing(ctx context.Context, name, source string) error {
	if _, err := command(ctx, b.program, "image", "snapshot", "create", source, "snap"); err != nil {
		return err
	}
	var idle []time.Duration
	for range min(b.pairs, 3) {
		d, err := b.restoreOnce(ctx, source, func(dst string) error { return cloneSnapshot(ctx, source, dst) })
		if err != nil {
			return err
		}
		idle = append(idle, d)
	}
	b.report.add(row{Part: "restore", Name: name, Unit: "ms", Ours: milliseconds(median(idle))}, false)

	img, err := openImage(source, false)
	if err != nil {
		return err
	}
	l := &latencies{of: map[string][]request{}, phases: map[string]span{}}
	guest, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		work(guest, img, 16<<30, writePause, l)
	}()
	wait := func() error {
		<-time.After(b.load)
		return ctx.Err()
	}
	err = l.phase("before", wait)
	if err == nil {
		_, err = b.restoreOnce(ctx, source, func(dst string) error {
			return l.phase("restore", func() error { return cloneFrom(ctx, img, dst) })
		})
	}
	stop()
	<-done
	if err := errors.Join(err, l.err, img.Close()); err != nil {
		return err
	}
	b.report.add(row{Part: "restore", Name: name + ", beside a guest", Unit: "ms", Ours: milliseconds(l.took("restore"))}, false)
	for _, phase := range []string{"before", "restore"} {
		longest := milliseconds(quantile(l.during(phase, "write"), 1))
		b.report.add(row{Part: "restore", Name: fmt.Sprintf("%s, %s: longest write", name, phase), Unit: "ms", Ours: longest}, false)
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

// cloneSnapshot restores the snapshot "snap" of an image that nobody uses.
func cloneSnapshot(ctx context.Context, source, dst string) error {
	img, err := openImage(source, true)
	if err != nil {
		return err
	}
	return errors.Join(cloneFrom(ctx, img, dst), img.Close())
}

func cloneFrom(ctx context.Context, img *qcow2.Image, dst string) error {
	v, err := img.OpenSnapshot(qcow2.ByName("snap"))
	if err != nil {
		return err
	}
	defer v.Close()
	out, err := qcow2.CreateFile(dst)
	if err != nil {
		return err
	}
	return errors.Join(qcow2.Clone(ctx, out, v, 0, nil), out.Close())
}

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// served is an image in use: a disk and the operations that go on beside its guest.
type served struct {
	target
	create, remove func() error
	close          func() error
}

// serveOurs opens an image in this process.
func serveOurs(ctx context.Context, path string) (*served, error) {
	img, err := openServed(path)
	if err != nil {
		return nil, err
	}
	return &served{
		target: img,
		create: func() error { _, err := img.CreateSnapshot(ctx, "online", nil); return err },
		remove: func() error { return img.DeleteSnapshot(ctx, qcow2.ByName("online")) },
		close:  img.Close,
	}, nil
}

// openServed opens an image as the engine does.
func openServed(path string) (*qcow2.Image, error) {
	f, err := qcow2.OpenDirectFile(path)
	if err != nil {
		return nil, err
	}
	return qcow2.Open(f, qcow2.OpenOptions{})
}

// writePause is between the writes of a guest whose latencies are measured, so that both sides bear the same load.
const writePause = time.Millisecond

// online compares what a guest's requests suffer while a snapshot is taken and deleted: 4 KiB writes at random places one
// after the other, reads beside them, a flush every 100 ms. Ours is the engine in this process; QEMU's is
// qemu-storage-daemon, exported through FUSE. Reads of another file tell when the disk itself makes everybody wait.
func (b *bench) online(ctx context.Context) error {
	table("a write and a read each ms", "ours", "QEMU", "times better")
	return b.besides(ctx, writePause, b.reportLatencies)
}

// throughput compares how many writes a guest that never pauses gets done before, during and after operations.
func (b *bench) throughput(ctx context.Context) error {
	table("writes as fast as they go", "ours", "QEMU", "times better")
	return b.besides(ctx, 0, b.reportRates)
}

func (b *bench) besides(ctx context.Context, pause time.Duration, report func(size string, l [2]*latencies)) error {
	for _, size := range b.sizes {
		var l [2]*latencies
		for who, serve := range []func(context.Context, string) (*served, error){serveOurs, b.serveQEMU} {
			master, err := b.mapped(ctx, size)
			if err != nil {
				return err
			}
			path, err := b.fresh(ctx, master, "online.qcow2")
			if err != nil {
				return err
			}
			if l[who], err = b.underLoad(ctx, path, master, size, pause, serve); err != nil {
				return err
			}
			if _, err := command(ctx, "qemu-img", "check", "-q", path); err != nil {
				return err
			}
		}
		report(size, l)
	}
	return os.Remove(filepath.Join(b.dir, "online.qcow2"))
}

// underLoad carries out operations on the image at path. bystander is a file beside it that nobody uses.
func (b *bench) underLoad(
	ctx context.Context, path, bystander, size string, pause time.Duration, serve func(context.Context, string) (*served, error),
) (*latencies, error) {
	n, err := parseSize(size)
	if err != nil {
		return nil, err
	}
	s, err := serve(ctx, path)
	if err != nil {
		return nil, err
	}
	l := &latencies{of: map[string][]request{}, phases: map[string]span{}}
	guest, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	all.Go(func() { work(guest, s, n, pause, l) })
	all.Go(func() { watch(guest, bystander, l) })
	idle := func() error {
		select {
		case <-ctx.Done():
		case <-time.After(b.load):
		}
		return ctx.Err()
	}
	for _, phase := range []struct {
		name string
		do   func() error
	}{{"before", idle}, {"create", s.create}, {"between", idle}, {"delete", s.remove}, {"after", idle}} {
		if err == nil {
			err = l.phase(phase.name, phase.do)
		}
	}
	stop()
	all.Wait()
	if e := s.close(); err == nil {
		err = e
	}
	if err == nil {
		err = l.err
	}
	return l, err
}

func (b *bench) reportLatencies(size string, l [2]*latencies) {
	for _, phase := range []string{"before", "create", "delete"} {
		for _, kind := range []string{"write", "read", "flush"} {
			for _, q := range []struct {
				name  string
				share float64
			}{{"99.9 %", 0.999}, {"longest", 1}} {
				x := row{Part: "online", Unit: "ms", Name: fmt.Sprintf("%s %s: %s, %s, ms", size, phase, kind, q.name)}
				x.Ours = milliseconds(quantile(l[0].during(phase, kind), q.share))
				x.QEMU = milliseconds(quantile(l[1].during(phase, kind), q.share))
				b.report.add(x, false)
			}
		}
		x := row{Part: "online", Unit: "ms", Name: fmt.Sprintf("%s %s: a read of another file, longest, ms", size, phase)}
		x.Ours, x.QEMU = milliseconds(quantile(l[0].during(phase, "bystander"), 1)), milliseconds(quantile(l[1].during(phase, "bystander"), 1))
		b.report.add(x, false)
	}
	for _, phase := range []string{"create", "delete"} {
		x := row{Part: "online", Unit: "ms", Name: fmt.Sprintf("%s %s: the operation itself, ms", size, phase)}
		x.Ours, x.QEMU = milliseconds(l[0].took(phase)), milliseconds(l[1].took(phase))
		b.report.add(x, false)
	}
}

func (b *bench) reportRates(size string, l [2]*latencies) {
	for _, phase := range []string{"before", "create", "between", "delete", "after"} {
		x := row{Part: "throughput", Unit: "1/s", Name: fmt.Sprintf("%s %s: writes per second", size, phase)}
		x.Ours, x.QEMU = l[0].rate(phase), l[1].rate(phase)
		b.report.add(x, true)
	}
}

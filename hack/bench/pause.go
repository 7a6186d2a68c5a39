package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pause compares, on block devices as pods get them, how long a guest's longest write and flush take without and with an
// operation beside: a snapshot taken, restored and deleted. Ours is a volume of an engine in a pool on each file system; its
// peers are a raw file on a loop device that is reflinked, which is what a driver with a file per volume does, and
// qemu-storage-daemon behind its FUSE export. The bound is what the host's disk does to a raw file's guest while somebody moves
// an operation's bytes of metadata, with its two syncs, in a file beside.
func (b *bench) pause(ctx context.Context) error {
	for _, fs := range hostFileSystems() {
		if !slices.Contains(strings.Split(b.hosts, ","), fs.name) {
			continue
		}
		if err := b.onHost(ctx, fs, func(dir string) error { return b.pausesOn(ctx, fs, dir) }); err != nil {
			return fmt.Errorf("on %s: %w", fs.name, err)
		}
	}
	return nil
}

// pauseWriter is a guest.
type pauseWriter struct {
	name  string
	depth int
	pause time.Duration
	flush bool // after each write
}

func pauseWriters() []pauseWriter {
	return []pauseWriter{
		{"a write each ms", 1, writePause, false},
		{"32 at a time", 32, 0, false},
		{"a flush after each", 1, 0, true},
	}
}

// guestDisk is a disk and the operations that are tried beside its guest.
type guestDisk struct {
	name string
	target
	size       int64
	operations []namedStep
	end        func() error
}

type namedStep struct {
	name string
	do   func() error
}

// afterOperation is how long a request counts as beside an operation after that has returned: what it has left to be done
// holds guests up, too.
const afterOperation = 300 * time.Millisecond

// pausesOn measures in a directory of a file system of its own.
func (b *bench) pausesOn(ctx context.Context, fs hostFileSystem, dir string) error {
	for _, d := range []struct {
		name  string
		disks []func(context.Context, string) (*guestDisk, error)
	}{
		{"16 GiB, 100,000 random writes", []func(context.Context, string) (*guestDisk, error){
			b.scatteredOurs, b.scatteredRaw, b.scatteredQEMU, b.boundOf("16G"),
		}},
		{"1 TiB, mapped", []func(context.Context, string) (*guestDisk, error){b.mappedOurs, b.mappedQEMU, b.boundOf("1T")}},
	} {
		if err := b.pausesOf(ctx, fs.name+", "+d.name, dir, d.disks); err != nil {
			return err
		}
	}
	return nil
}

// pauses are what was seen beside one kind of operation.
type pauses struct {
	longest map[string][]time.Duration // of each kind of request, one a round
	worst   map[string]string          // when the longest of all was
	took    []time.Duration            // the operation
}

func (b *bench) pausesOf(ctx context.Context, name, dir string, kinds []func(context.Context, string) (*guestDisk, error)) (err error) {
	var disks []*guestDisk
	defer func() {
		for _, d := range disks {
			err = errors.Join(err, d.end())
		}
	}()
	for _, open := range kinds {
		d, err := open(ctx, dir)
		if err != nil {
			return err
		}
		if d != nil {
			disks = append(disks, d)
		}
	}
	for _, w := range pauseWriters() {
		seen := map[string]*pauses{}
		for range b.pairs {
			for _, d := range disks {
				if err := b.round(ctx, d, w, seen); err != nil {
					return fmt.Errorf("%s, %s: %w", d.name, w.name, err)
				}
			}
		}
		b.reportPauses(name+", "+w.name, disks, seen)
	}
	return nil
}

// round carries out each operation once beside a guest.
func (b *bench) round(ctx context.Context, d *guestDisk, w pauseWriter, seen map[string]*pauses) error {
	l := &latencies{of: map[string][]request{}, phases: map[string]span{}}
	guest, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	all.Go(func() { writeBeside(guest, d, d.size, w, l) })
	wait := func(t time.Duration) func() error {
		return func() error {
			select {
			case <-ctx.Done():
			case <-time.After(t):
			}
			return ctx.Err()
		}
	}
	err := wait(b.load / 3)() // to warm up
	for _, step := range append([]namedStep{{"none", wait(afterOperation)}}, d.operations...) {
		if err != nil {
			break
		}
		p := seen[d.name+step.name]
		if p == nil {
			p = &pauses{longest: map[string][]time.Duration{}, worst: map[string]string{}}
			seen[d.name+step.name] = p
		}
		start := time.Now()
		var took time.Duration
		err = l.phase(step.name, func() error {
			err := step.do()
			took = time.Since(start)
			return errors.Join(err, wait(afterOperation)())
		})
		p.took = append(p.took, took)
		for _, kind := range []string{"write", "flush"} {
			at, longest := l.longest(step.name, kind)
			if len(p.longest[kind]) == 0 || longest > slices.Max(p.longest[kind]) {
				p.worst[kind] = fmt.Sprintf("%.0f of %.0f ms", milliseconds(at), milliseconds(took))
			}
			p.longest[kind] = append(p.longest[kind], longest)
		}
	}
	stop()
	all.Wait()
	return errors.Join(err, l.err)
}

// longest returns the longest request of a kind in a phase, and when in the phase it began.
func (l *latencies) longest(phase, kind string) (at, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.phases[phase]
	for _, r := range l.of[kind] {
		if d := r.to.Sub(r.from); d > took && r.from.Before(p.to) && r.to.After(p.from) {
			at, took = r.from.Sub(p.from), d
		}
	}
	return at, took
}

// writeBeside writes 4 KiB at random places of a disk until ctx ends, and flushes it.
func writeBeside(ctx context.Context, t target, size int64, w pauseWriter, l *latencies) {
	var all sync.WaitGroup
	for range w.depth {
		all.Go(func() {
			p := alignedBlock()
			for ctx.Err() == nil {
				if w.pause > 0 {
					<-time.After(w.pause)
				}
				from := time.Now()
				_, err := t.WriteAt(p, rand.Int64N(size/guestBlock)*guestBlock)
				l.note("write", from, err)
				if w.flush && err == nil {
					from = time.Now()
					err = t.Flush()
					l.note("flush", from, err)
				}
				if err != nil {
					return
				}
			}
		})
	}
	for !w.flush && ctx.Err() == nil {
		<-time.After(flushEvery)
		from := time.Now()
		if err := t.Flush(); err != nil {
			l.note("flush", from, err)
			break
		}
		l.note("flush", from, nil)
	}
	all.Wait()
}

// reportPauses prints the medians of the longest requests, the worst, and when in the operation that was.
func (b *bench) reportPauses(name string, disks []*guestDisk, seen map[string]*pauses) {
	columns := []string{name}
	for _, d := range disks {
		columns = append(columns, d.name)
	}
	table(columns...)
	for _, step := range []string{"none", "create", "restore", "delete"} {
		for _, kind := range []string{"write", "flush"} {
			cells, x := "", row{Part: "pause", Unit: "ms", Name: fmt.Sprintf("%s, %s: longest %s", name, step, kind)}
			for i, d := range disks {
				p := seen[d.name+step]
				if p == nil {
					cells += " |"
					continue
				}
				usual := milliseconds(median(slices.Clone(p.longest[kind])))
				cells += fmt.Sprintf(" %s, worst %s at %s |", number(usual), number(milliseconds(slices.Max(p.longest[kind]))), p.worst[kind])
				switch {
				case i == 0:
					x.Ours = usual
				case d.name == "QEMU":
					x.QEMU = usual
				case d.name == "bound":
					x.Bound = usual
				}
			}
			b.report.Rows = append(b.report.Rows, x)
			fmt.Printf("| %s: longest %s, ms |%s\n", step, kind, cells)
		}
	}
	fmt.Println()
}

// scatteredOurs attaches a volume whose disk was written at random places.
func (b *bench) scatteredOurs(ctx context.Context, dir string) (*guestDisk, error) {
	return b.guestOurs(ctx, dir, scatterSize, func(path string) error {
		if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.Itoa(scatterSize)); err != nil {
			return err
		}
		return scatter(ctx, path, scatterWrites)
	})
}

// mappedOurs attaches a volume whose disk is mapped to the last cluster.
func (b *bench) mappedOurs(ctx context.Context, dir string) (*guestDisk, error) {
	return b.guestOurs(ctx, dir, 1<<40, func(path string) error {
		_, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "1T")
		return err
	})
}

func (b *bench) guestOurs(ctx context.Context, dir string, size int64, makeImage func(path string) error) (*guestDisk, error) {
	v, err := b.attach(ctx, dir, size, makeImage)
	if err != nil {
		return nil, err
	}
	d, err := openDevice(v.device)
	if err != nil {
		return nil, errors.Join(err, v.end())
	}
	restored := filepath.Join(filepath.Dir(v.pool.ImagePath(v.id)), "restored")
	return &guestDisk{"ours", d, size, []namedStep{
		{"create", func() error { _, err := v.engine.CreateSnapshot(ctx, v.id, "s", nil); return err }},
		{"restore", func() error { return v.engine.Clone(ctx, v.id, "s", restored, 0) }},
		{"delete", func() error { return errors.Join(v.engine.DeleteSnapshot(ctx, v.id, "s"), os.Remove(restored)) }},
	}, func() error { return errors.Join(d.Close(), v.end()) }}, nil
}

// scatteredRaw puts a raw file, written at the same places, on a loop device. Its snapshots are reflinks. nil where there
// are none.
func (b *bench) scatteredRaw(ctx context.Context, dir string) (*guestDisk, error) {
	raw := filepath.Join(dir, "raw")
	reflink := func(from, to string) func() error {
		return func() error {
			_, err := command(ctx, "cp", "--reflink=always", from, to)
			return err
		}
	}
	if err := os.WriteFile(raw, []byte("content"), 0o600); err != nil {
		return nil, err
	}
	if reflink(raw, raw+".s")() != nil {
		return nil, errors.Join(os.Remove(raw), os.RemoveAll(raw+".s"))
	}
	return b.guestRaw(ctx, "reflinked raw file", raw, []namedStep{
		{"create", reflink(raw, raw+".s")},
		{"restore", reflink(raw+".s", raw+".restored")},
		{"delete", func() error { return errors.Join(os.Remove(raw+".s"), os.Remove(raw+".restored")) }},
	})
}

// boundOf returns what makes a raw file's disk beside which the metadata of a disk of a size is moved.
func (b *bench) boundOf(size string) func(context.Context, string) (*guestDisk, error) {
	return func(ctx context.Context, dir string) (*guestDisk, error) {
		beside, err := newDisk(dir, size)
		if err != nil {
			return nil, err
		}
		var operations []namedStep
		for _, s := range steps() {
			if name, ok := map[string]string{"create, first": "create", "delete, last": "delete"}[s.name]; ok {
				operations = append(operations, namedStep{name, func() error { _, err := beside.transfer(s); return err }})
			}
		}
		d, err := b.guestRaw(ctx, "bound", filepath.Join(dir, "bound"), operations)
		if err != nil {
			return nil, errors.Join(err, beside.close())
		}
		end := d.end
		d.end = func() error { return errors.Join(end(), beside.close()) }
		return d, nil
	}
}

// guestRaw puts a raw file of its own on a loop device and writes it at random places.
func (b *bench) guestRaw(ctx context.Context, name, path string, operations []namedStep) (*guestDisk, error) {
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, scatterSize)); err != nil {
		return nil, err
	}
	device, detach, err := onLoop(ctx, path)
	if err != nil {
		return nil, err
	}
	d, err := openDevice(device)
	if err != nil {
		return nil, errors.Join(err, detach())
	}
	if err := scatterOn(d, scatterWrites); err != nil {
		return nil, errors.Join(err, d.Close(), detach())
	}
	return &guestDisk{name, d, scatterSize, operations, func() error { return errors.Join(d.Close(), detach(), os.Remove(path)) }}, nil
}

func (b *bench) scatteredQEMU(ctx context.Context, dir string) (*guestDisk, error) {
	path := filepath.Join(dir, "qemu.qcow2")
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.Itoa(scatterSize)); err != nil {
		return nil, err
	}
	if err := scatter(ctx, path, scatterWrites); err != nil {
		return nil, err
	}
	return b.guestQEMU(ctx, path, scatterSize)
}

func (b *bench) mappedQEMU(ctx context.Context, dir string) (*guestDisk, error) {
	path := filepath.Join(dir, "qemu.qcow2")
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "1T"); err != nil {
		return nil, err
	}
	return b.guestQEMU(ctx, path, 1<<40)
}

// guestQEMU has no restore beside a guest: the daemon knows none.
func (b *bench) guestQEMU(ctx context.Context, path string, size int64) (*guestDisk, error) {
	s, err := b.serveQEMU(ctx, path)
	if err != nil {
		return nil, err
	}
	return &guestDisk{"QEMU", s.target, size, []namedStep{{"create", s.create}, {"delete", s.remove}}, func() error {
		return errors.Join(s.close(), os.Remove(path))
	}}, nil
}

// deviceTarget is a block device, used past the page cache.
type deviceTarget struct{ *os.File }

func openDevice(path string) (deviceTarget, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	return deviceTarget{f}, err
}

func (d deviceTarget) Flush() error { return d.Sync() }

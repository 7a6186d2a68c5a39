package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
)

// allocateSize is the size of the disks whose clusters are to be allocated.
const allocateSize = 1 << 30

// allocate compares I/O that needs new clusters, on images of the same bytes: on an empty one, and right after a snapshot of
// one that is fully mapped. Each run has an image of its own.
func (b *bench) allocate(ctx context.Context) error {
	raw, empty := filepath.Join(b.dir, "allocate.raw"), filepath.Join(b.dir, "empty.qcow2")
	snapshot := filepath.Join(b.dir, "snapshot.qcow2")
	for _, args := range [][]string{
		{"fio", "--name=fill", "--filename=" + raw, "--rw=write", "--bs=1m", "--size=" + strconv.Itoa(allocateSize)},
		{"qemu-img", "create", "-q", "-f", "qcow2", empty, strconv.Itoa(allocateSize)},
		{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, snapshot},
		{"qemu-img", "snapshot", "-c", "s", snapshot},
		{"rm", raw},
	} {
		if _, err := command(ctx, args[0], args[1:]...); err != nil {
			return err
		}
	}
	random := func(depth int) []string {
		return []string{"--rw=randwrite", "--bs=4k", "--iodepth=" + strconv.Itoa(depth)}
	}
	table("new clusters", "ours", "QEMU", "ours / QEMU", "CPU: ours / QEMU")
	for _, x := range []struct {
		image string
		ioLoad
	}{
		{empty, ioLoad{"empty: randread 4K QD32", []string{"--rw=randread", "--bs=4k", "--iodepth=32"}, false}},
		{empty, ioLoad{"empty: randwrite 4K QD1", random(1), false}},
		{empty, ioLoad{"empty: randwrite 4K QD32", random(32), false}},
		{empty, ioLoad{"empty: seqwrite 1M QD8", []string{"--rw=write", "--bs=1m", "--iodepth=8"}, true}},
		{snapshot, ioLoad{"snapshot: randwrite 4K QD1", random(1), false}},
		{snapshot, ioLoad{"snapshot: randwrite 4K QD32", random(32), false}},
	} {
		var figures [2][]ioFigure
		for range b.pairs {
			for i, start := range []func(context.Context, string) (*ioTarget, error){b.ioOurs, b.ioQEMU} {
				f, err := b.allocateOnce(ctx, start, x.image, x.ioLoad)
				if err != nil {
					return err
				}
				figures[i] = append(figures[i], f)
			}
		}
		b.reportPair(x.ioLoad, figures[0], figures[1])
	}
	return nil
}

func (b *bench) allocateOnce(
	ctx context.Context, start func(context.Context, string) (*ioTarget, error), image string, load ioLoad,
) (ioFigure, error) {
	t, err := start(ctx, image)
	if err != nil {
		return ioFigure{}, err
	}
	f, err := runFio(ctx, t.device, load, b.load)
	return f, errors.Join(err, t.end())
}

// reportPair prints the medians of a row, and those of the ratios of runs that followed each other.
func (b *bench) reportPair(load ioLoad, ours, qemu []ioFigure) {
	rate := func(fs []ioFigure) float64 { return medianOf(fs, func(i int) float64 { return fs[i].rate }) }
	x := row{Part: "allocate", Name: load.name + ", " + load.unit(), Unit: load.unit(), Ours: rate(ours), QEMU: rate(qemu)}
	x.Ratio = medianOf(ours, func(i int) float64 { return ours[i].rate / qemu[i].rate })
	b.report.Rows = append(b.report.Rows, x)
	fmt.Printf("| %s | %s | %s | %s | %s |\n", x.Name, number(x.Ours), number(x.QEMU), number(x.Ratio),
		number(medianOf(ours, func(i int) float64 { return ours[i].cpu / qemu[i].cpu })))
}

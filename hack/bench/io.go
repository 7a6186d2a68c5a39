package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ioSize is the size of the disks of the I/O table, which are fully mapped.
const ioSize = 2 << 30

// ioLoad is one row of the table, as fio's options.
type ioLoad struct {
	name string
	fio  []string
	bulk bool // MB/s, not IOPS
}

func (l ioLoad) unit() string {
	if l.bulk {
		return "MB/s"
	}
	return "1/s"
}

func ioLoads() []ioLoad {
	return []ioLoad{
		{"randread 4K QD1", []string{"--rw=randread", "--bs=4k", "--iodepth=1"}, false},
		{"randwrite 4K QD1", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1"}, false},
		{"randread 4K QD32", []string{"--rw=randread", "--bs=4k", "--iodepth=32"}, false},
		{"randwrite 4K QD32", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}, false},
		{"70/30 4K QD32", []string{"--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32"}, false},
		{"fsync after each 4K write", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"}, false},
		{"seqread 1M QD8", []string{"--rw=read", "--bs=1m", "--iodepth=8"}, true},
		{"seqwrite 1M QD8", []string{"--rw=write", "--bs=1m", "--iodepth=8"}, true},
	}
}

// ioFigure is what one run gave.
type ioFigure struct {
	rate float64 // IOPS, or MB/s
	cpu  float64 // microseconds of the whole machine per request, fio's own left out
}

// io compares block devices of the same content: a raw file on a loop device, which is the ceiling; the same served by our
// server, without an image; an image in our engine; and the image in qemu-storage-daemon behind a FUSE export.
func (b *bench) io(ctx context.Context) (err error) {
	master := filepath.Join(b.dir, "io.raw")
	if _, err := command(ctx, "fio", "--name=fill", "--filename="+master, "--rw=write", "--bs=1m", "--size="+strconv.Itoa(ioSize)); err != nil {
		return err
	}
	var targets []*ioTarget
	defer func() {
		for _, t := range slices.Backward(targets) {
			err = errors.Join(err, t.end())
		}
	}()
	image := filepath.Join(b.dir, "io.qcow2")
	if err := convert(ctx, master, image); err != nil {
		return err
	}
	for _, start := range []func() (*ioTarget, error){
		func() (*ioTarget, error) { return b.ioRaw(ctx, master) },
		func() (*ioTarget, error) { return b.ioPassThrough(ctx, master) },
		func() (*ioTarget, error) { return b.ioOurs(ctx, image) },
		func() (*ioTarget, error) { return b.ioQEMU(ctx, image) },
	} {
		t, err := start()
		if err != nil {
			return err
		}
		targets = append(targets, t)
	}
	columns := []string{"io"}
	for _, t := range targets {
		columns = append(columns, t.name)
	}
	table(append(columns, "ours / QEMU", "ours / pass-through", "CPU: ours / QEMU")...)
	for _, load := range ioLoads() {
		figures := make([][]ioFigure, len(targets))
		for range b.pairs {
			for i, t := range targets {
				f, err := runFio(ctx, t.device, load, b.load)
				if err != nil {
					return err
				}
				figures[i] = append(figures[i], f)
			}
		}
		b.reportIO(load, figures)
	}
	return nil
}

// reportIO prints the medians of a row, and those of the ratios of runs that followed each other.
func (b *bench) reportIO(load ioLoad, figures [][]ioFigure) {
	unit := load.unit()
	cells := []string{load.name + ", " + unit}
	for _, fs := range figures {
		cells = append(cells, fmt.Sprintf("%s, %s µs", number(medianOf(fs, func(i int) float64 { return fs[i].rate })),
			number(medianOf(fs, func(i int) float64 { return fs[i].cpu }))))
	}
	pass, ours, qemu := figures[1], figures[2], figures[3]
	for _, ratio := range []func(i int) float64{
		func(i int) float64 { return ours[i].rate / qemu[i].rate },
		func(i int) float64 { return ours[i].rate / pass[i].rate },
		func(i int) float64 { return ours[i].cpu / qemu[i].cpu },
	} {
		cells = append(cells, number(medianOf(ours, ratio)))
	}
	fmt.Printf("| %s |\n", strings.Join(cells, " | "))
	x := row{Part: "io", Name: load.name, Unit: unit}
	x.Ours, x.QEMU = medianOf(ours, func(i int) float64 { return ours[i].rate }), medianOf(qemu, func(i int) float64 { return qemu[i].rate })
	x.Ratio = medianOf(ours, func(i int) float64 { return ours[i].rate / qemu[i].rate })
	b.report.Rows = append(b.report.Rows, x)
}

func medianOf(fs []ioFigure, of func(i int) float64) float64 {
	var xs []float64
	for i := range fs {
		xs = append(xs, of(i))
	}
	return medianFloat(xs)
}

func medianFloat(xs []float64) float64 {
	slices.Sort(xs)
	return xs[len(xs)/2]
}

// runFio loads a device for a time.
func runFio(ctx context.Context, device string, load ioLoad, lasts time.Duration) (ioFigure, error) {
	args := append([]string{
		"--name=io", "--filename=" + device, "--direct=1", "--ioengine=io_uring", "--time_based", "--norandommap", "--randrepeat=0",
		"--runtime=" + lasts.String(), "--output-format=json",
	}, load.fio...)
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stderr = os.Stderr
	before := busyTime()
	out, err := cmd.Output()
	busy := busyTime() - before
	if err != nil {
		return ioFigure{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	var result struct {
		Jobs []struct {
			Read, Write struct {
				Iops     float64 `json:"iops"`
				Bytes    float64 `json:"bw_bytes"`
				TotalIOs float64 `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		return ioFigure{}, fmt.Errorf("fio's answer: %w", err)
	}
	j := result.Jobs[0]
	busy -= cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	f := ioFigure{rate: j.Read.Iops + j.Write.Iops, cpu: float64(busy.Microseconds()) / (j.Read.TotalIOs + j.Write.TotalIOs)}
	if load.bulk {
		f.rate = (j.Read.Bytes + j.Write.Bytes) / 1e6
	}
	return f, nil
}

// busyTime is how long the processors of the machine have worked.
func busyTime() time.Duration {
	words := strings.Fields(firstWords("/proc/stat", 9))
	var ticks int64
	for i, w := range words[1:] {
		if i == 3 || i == 4 { // idle, and waiting for I/O
			continue
		}
		n, _ := strconv.ParseInt(w, 10, 64)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

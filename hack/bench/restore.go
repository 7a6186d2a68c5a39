package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
	for _, fs := range hostFileSystems()[1:] {
		if err := b.onHost(ctx, fs, func(dir string) error { return b.restoreSharing(ctx, fs.name, dir) }); err != nil {
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
			d, end, err := restoreOnce(ctx, source, func(dst string) error {
				if who == 0 {
					return cloneSnapshot(ctx, source, dst)
				}
				_, err := command(ctx, "qemu-img", "convert", "-l", "snap", "-O", "qcow2", source, dst)
				return err
			})
			if err = errors.Join(err, end()); err != nil {
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

// restoreOnce returns how long it takes to restore a snapshot durably, and what checks and removes what came of it.
func restoreOnce(ctx context.Context, source string, restore func(dst string) error) (took time.Duration, end func() error, err error) {
	dst := filepath.Join(filepath.Dir(source), "restored.qcow2")
	start := time.Now()
	if err = restore(dst); err == nil {
		_, err = command(ctx, "sync", dst)
	}
	return time.Since(start), func() error {
		_, err := command(ctx, "qemu-img", "check", "-q", dst)
		return errors.Join(err, os.Remove(dst))
	}, err
}

// restoreSharing measures on a file system of its own that can share blocks. QEMU's tools cannot, so nothing is compared.
func (b *bench) restoreSharing(ctx context.Context, name, dir string) error {
	if err := b.sharing(ctx, dir, name+", 100 GiB in one piece", 100<<30, func(path string) error {
		_, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", path, "100G")
		return err
	}); err != nil {
		return err
	}
	return b.sharing(ctx, dir, name+", 100,000 random writes", scatterSize, func(path string) error {
		if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.Itoa(scatterSize)); err != nil {
			return err
		}
		return scatter(ctx, path, scatterWrites)
	})
}

// scatterSize is the size of a disk that is written at random places.
const scatterSize = 16 << 30

const scatterWrites = 100_000

// scatter makes so many 4 KiB writes at random places of an image's disk.
func scatter(ctx context.Context, path string, writes int) error {
	s, err := serveOurs(ctx, path)
	if err != nil {
		return err
	}
	return errors.Join(scatterOn(s, writes), s.close())
}

func scatterOn(t target, writes int) error {
	rng, p := rand.New(rand.NewPCG(3, 4)), alignedBlock()
	for range writes {
		if _, err := t.WriteAt(p, rng.Int64N(scatterSize/guestBlock)*guestBlock); err != nil {
			return err
		}
	}
	return t.Flush()
}

// sharing restores a snapshot of an attached volume, first with nothing beside, then while fio works on the volume.
func (b *bench) sharing(ctx context.Context, dir, name string, size int64, makeImage func(path string) error) (err error) {
	v, err := b.attach(ctx, dir, size, makeImage)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.end()) }()
	if _, err := v.engine.CreateSnapshot(ctx, v.id, "snap", nil); err != nil {
		return err
	}
	restore := func() (time.Duration, func() error, error) {
		return restoreOnce(ctx, v.pool.ImagePath(v.id), func(dst string) error { return v.engine.Clone(ctx, v.id, "snap", dst, 0) })
	}
	var idle []time.Duration
	for range min(b.pairs, 3) {
		d, end, err := restore()
		if err = errors.Join(err, end()); err != nil {
			return err
		}
		idle = append(idle, d)
	}
	b.report.add(row{Part: "restore", Name: name, Unit: "ms", Ours: milliseconds(median(idle))}, false)
	// What removing those has left to be committed is not the next one's.
	if _, err := command(ctx, "sync", "-f", dir); err != nil {
		return err
	}
	for _, beside := range []string{"before", "restore"} {
		var took time.Duration
		end := func() error { return nil }
		longest, err := longestBeside(ctx, v.device, func() error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(b.load):
			}
			if beside == "restore" {
				took, end, err = restore()
			}
			return err
		})
		if err = errors.Join(err, end()); err != nil {
			return err
		}
		if beside == "restore" {
			b.report.add(row{Part: "restore", Name: name + ", beside fio", Unit: "ms", Ours: milliseconds(took)}, false)
		}
		for _, kind := range []string{"write", "flush"} {
			b.report.add(row{Part: "restore", Name: fmt.Sprintf("%s, %s: longest %s", name, beside, kind), Unit: "ms", Ours: longest[kind]}, false)
		}
	}
	return nil
}

// longestBeside has fio write 4 KiB at random places of a device, with a pause of 1 ms, and in a second job with a flush
// each 100 ms, while something is done. It returns how long the longest write and flush took, in ms.
func longestBeside(ctx context.Context, device string, do func() error) (map[string]float64, error) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", "--filename="+device, "--direct=1", "--ioengine=io_uring", "--rw=randwrite", "--bs=4k",
		"--time_based", "--runtime=1h", "--norandommap", "--output-format=json",
		"--name=write", "--thinktime="+strconv.FormatInt(writePause.Microseconds(), 10),
		"--name=flush", "--thinktime="+strconv.FormatInt(flushEvery.Microseconds(), 10), "--fsync=1")
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	err := do()
	// Interrupted it says what it has seen, and exits with 128.
	_ = cmd.Process.Signal(os.Interrupt)
	_ = cmd.Wait()
	var result struct {
		Jobs []struct {
			Error       int
			Write, Sync struct {
				Latency struct{ Max float64 } `json:"lat_ns"`
			}
		}
	}
	text := out.Bytes()
	if i := bytes.IndexByte(text, '{'); i > 0 {
		text = text[i:]
	}
	if e := json.Unmarshal(text, &result); e != nil || len(result.Jobs) != 2 || result.Jobs[0].Error+result.Jobs[1].Error != 0 {
		return nil, errors.Join(err, fmt.Errorf("fio's answer: %w: %s", e, out.Bytes()))
	}
	return map[string]float64{
		"write": max(result.Jobs[0].Write.Latency.Max, result.Jobs[1].Write.Latency.Max) / 1e6,
		"flush": result.Jobs[1].Sync.Latency.Max / 1e6,
	}, err
}

// filled makes an image of 16 GiB with so many bytes of data and the snapshot "snap".
func (b *bench) filled(ctx context.Context, path string, data int64) error {
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, "16G"); err != nil {
		return err
	}
	s, err := serveOurs(ctx, path)
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
	f, err := qcow2.OpenFile(source, true)
	if err != nil {
		return err
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
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

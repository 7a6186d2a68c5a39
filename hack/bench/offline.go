package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// step is a command that both programs have. Reads and writes are what it needs of an image whose disk is fully mapped,
// in units of all its L2 tables and of all its refcount blocks.
type step struct {
	name           string
	ours, qemu     []string // IMAGE stands for the image
	readL2, readRC int64
	wrteL2, wrteRC int64
}

// steps are the life of an image: the first snapshot has to clear COPIED in each table, the second shares the tables, goto
// compares two states that are the same, the last deletion sets COPIED again.
func steps() []step {
	ours := func(verb, name string) []string { return []string{"image", "snapshot", verb, "IMAGE", name} }
	qemu := func(flag, name string) []string { return []string{"snapshot", flag, name, "IMAGE"} }
	return []step{
		{"check", []string{"image", "check", "IMAGE"}, []string{"check", "-q", "IMAGE"}, 1, 1, 0, 0},
		{"create, first", ours("create", "a"), qemu("-c", "a"), 1, 1, 1, 1},
		{"create, second", ours("create", "b"), qemu("-c", "b"), 1, 1, 0, 1},
		{"goto", ours("goto", "a"), qemu("-a", "a"), 2, 0, 0, 0},
		{"delete, shared", ours("delete", "a"), qemu("-d", "a"), 1, 1, 0, 1},
		{"delete, last", ours("delete", "b"), qemu("-d", "b"), 1, 1, 1, 1},
	}
}

func onImage(args []string, image string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = strings.ReplaceAll(a, "IMAGE", image)
	}
	return out
}

// mapped makes an image with a fully mapped disk of 64 KiB clusters, sparse on the host's disk.
func (b *bench) mapped(ctx context.Context, size string) (string, error) {
	path := filepath.Join(b.dir, "mapped-"+size+".qcow2")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	_, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
	return path, err
}

// fresh copies an image and waits until nothing of it is left to be written. The copy is in the page cache.
func (b *bench) fresh(ctx context.Context, master, name string) (string, error) {
	path := filepath.Join(b.dir, name)
	if _, err := command(ctx, "cp", "--sparse=always", master, path); err != nil {
		return "", err
	}
	_, err := command(ctx, "sync", path)
	return path, err
}

// offline compares the commands on detached images, with a warm page cache for both.
func (b *bench) offline(ctx context.Context) error {
	table("64 KiB clusters, fully mapped", "ours ms", "QEMU ms", "times faster", "bound ms", "ours / bound")
	for _, size := range b.sizes {
		if err := b.offlineSize(ctx, size); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) offlineSize(ctx context.Context, size string) error {
	master, err := b.mapped(ctx, size)
	if err != nil {
		return err
	}
	all := steps()
	times := make([][2][]time.Duration, len(all))
	bounds := make([][]time.Duration, len(all))
	disk, err := newDisk(b.dir, size)
	if err != nil {
		return err
	}
	defer disk.close()
	for pair := range b.pairs {
		for turn := range 2 {
			who := (pair + turn) % 2
			image, err := b.fresh(ctx, master, "work.qcow2")
			if err != nil {
				return err
			}
			for i, s := range all {
				name, args := b.program, s.ours
				if who == 1 {
					name, args = "qemu-img", s.qemu
				}
				d, err := command(ctx, name, onImage(args, image)...)
				if err != nil {
					return err
				}
				times[i][who] = append(times[i][who], d)
			}
			if _, err := command(ctx, "qemu-img", "check", "-q", image); err != nil {
				return err
			}
		}
		for i, s := range all {
			d, err := disk.transfer(s)
			if err != nil {
				return err
			}
			bounds[i] = append(bounds[i], d)
		}
	}
	for i, s := range all {
		x := row{
			Part: "offline", Name: size + " " + s.name, Unit: "ms", Ours: milliseconds(median(times[i][0])),
			QEMU: milliseconds(median(times[i][1])), Bound: milliseconds(median(bounds[i])),
		}
		b.report.add(x, false, number(x.Bound), number(x.Ours/x.Bound))
	}
	return os.Remove(filepath.Join(b.dir, "work.qcow2"))
}

// calls counts the system calls of each command, and those that sync.
func (b *bench) calls(ctx context.Context) error {
	table("system calls (syncs)", "ours", "QEMU", "times fewer", "our syncs", "QEMU's syncs")
	size := b.sizes[min(1, len(b.sizes)-1)]
	master, err := b.mapped(ctx, size)
	if err != nil {
		return err
	}
	var images [2]string
	for who := range images {
		if images[who], err = b.fresh(ctx, master, fmt.Sprintf("calls-%d.qcow2", who)); err != nil {
			return err
		}
	}
	for _, s := range steps() {
		var counts, syncs [2]int64
		for who, args := range [][]string{append([]string{b.program}, s.ours...), append([]string{"qemu-img"}, s.qemu...)} {
			if counts[who], syncs[who], err = b.strace(ctx, onImage(args, images[who])); err != nil {
				return err
			}
		}
		x := row{Part: "calls", Name: size + " " + s.name, Unit: "calls", Ours: float64(counts[0]), QEMU: float64(counts[1])}
		b.report.add(x, false, fmt.Sprint(syncs[0]), fmt.Sprint(syncs[1]))
	}
	return nil
}

// strace runs a command and counts.
func (b *bench) strace(ctx context.Context, args []string) (calls, syncs int64, err error) {
	out := filepath.Join(b.dir, "strace")
	if _, err := command(ctx, "strace", append([]string{"-f", "-c", "-U", "calls,name", "-o", out}, args...)...); err != nil {
		return 0, 0, err
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		var n int64
		var name string
		if k, _ := fmt.Sscan(line, &n, &name); k != 2 || name == "total" { // heads and rules do not parse
			continue
		}
		calls += n
		if name == "fdatasync" || name == "fsync" {
			syncs += n
		}
	}
	return calls, syncs, nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// filesSize is the size of the disks that file systems are made on.
const filesSize = "4G"

// filesStep is a script for the shell, in the mounted directory.
type filesStep struct{ name, do string }

// filesSteps are what people do with files, each until all of it is on the disk.
func filesSteps(tree, repository string) []filesStep {
	return []filesStep{
		{"untar the sources of Go", "tar xf " + tree},
		{"git clone of this repository, three times", "for i in 1 2 3; do git clone -q --no-local " + repository + " clone$i; done"},
		{"sqlite, 500 transactions", `(echo "create table t (a integer, b text);"
			for i in $(seq 500); do echo "insert into t values ($i, hex(randomblob(200)));"; done) | sqlite3 db`},
	}
}

// files compares an ext4 on block devices that are empty at first: a raw file on a loop device, and an image in our engine.
// QEMU is left out: what mkfs.ext4 writes to the FUSE export of QEMU 7.2, e2fsck does not accept.
func (b *bench) files(ctx context.Context) error {
	raw, image, tree := filepath.Join(b.dir, "files.raw"), filepath.Join(b.dir, "files.qcow2"), filepath.Join(b.dir, "files.tar")
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return err
	}
	repository, err := os.Getwd()
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{"tar", "cf", tree, "-C", strings.TrimSpace(string(root)) + "/src", "."},
		{"qemu-img", "create", "-q", "-f", "qcow2", image, filesSize},
	} {
		if _, err := command(ctx, args[0], args[1:]...); err != nil {
			return err
		}
	}
	steps := filesSteps(tree, repository)
	took := make([][2][]time.Duration, len(steps))
	for range b.pairs {
		for i, start := range []func() (*ioTarget, error){
			func() (*ioTarget, error) {
				if err := errors.Join(os.RemoveAll(raw), os.WriteFile(raw, nil, 0o600), os.Truncate(raw, 4<<30)); err != nil {
					return nil, err
				}
				return b.ioRaw(ctx, raw)
			},
			func() (*ioTarget, error) { return b.ioOurs(ctx, image) },
		} {
			t, err := start()
			if err != nil {
				return err
			}
			err = b.onFileSystem(t.device, func(dir string) error {
				for k, s := range steps {
					d, err := inShell(ctx, dir, s.do)
					if err != nil {
						return err
					}
					took[k][i] = append(took[k][i], d)
				}
				return nil
			})
			if err := errors.Join(err, t.end()); err != nil {
				return err
			}
		}
	}
	table("ext4, s", "raw file on loop", "ours", "ours / raw")
	for k, s := range steps {
		raw, ours := median(took[k][0]).Seconds(), median(took[k][1]).Seconds()
		b.report.Rows = append(b.report.Rows, row{Part: "files", Name: s.name, Unit: "s", Ours: ours, Bound: raw})
		fmt.Printf("| %s | %s | %s | %s |\n", s.name, number(raw), number(ours), number(ours/raw))
	}
	return nil
}

// onFileSystem makes an ext4 on a device and mounts it for the time of a call.
func (b *bench) onFileSystem(device string, do func(dir string) error) error {
	dir, err := os.MkdirTemp(b.dir, "mnt")
	if err != nil {
		return err
	}
	// Without a context: a mounted file system must go.
	out, err := exec.Command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device).CombinedOutput() //nolint:noctx // see above
	if err != nil {
		return fmt.Errorf("mkfs.ext4 %s: %w: %s", device, err, out)
	}
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return errors.Join(do(dir), unix.Unmount(dir, 0), os.Remove(dir))
}

// inShell returns how long a script took with a sync of the file system.
func inShell(ctx context.Context, dir, script string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, "sh", "-ec", script+"\nsync -f .")
	cmd.Dir = dir
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return time.Since(start), nil
}

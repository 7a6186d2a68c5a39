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

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// ioTarget is a block device under load.
type ioTarget struct {
	name   string
	device string
	end    func() error // also removes what was made for it
}

// onLoop puts a loop device with direct I/O on a file.
func onLoop(ctx context.Context, path string) (device string, end func() error, err error) {
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", path).Output()
	if err != nil {
		return "", nil, fmt.Errorf("losetup %s: %w", path, err)
	}
	device = strings.TrimSpace(string(out))
	return device, func() error {
		_, err := command(context.WithoutCancel(ctx), "losetup", "--detach", device)
		return err
	}, nil
}

// hostFileSystem is one that a pool may be on.
type hostFileSystem struct {
	name string
	mkfs []string
}

func hostFileSystems() []hostFileSystem {
	return []hostFileSystem{
		{"ext4", []string{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"}},
		{"XFS", []string{"mkfs.xfs", "-q", "-m", "reflink=1"}},
		{"btrfs", []string{"mkfs.btrfs", "-q"}},
	}
}

// onHost makes a file system on a disk of its own, of 400 GiB, and mounts it for the time of a call.
func (b *bench) onHost(ctx context.Context, fs hostFileSystem, do func(dir string) error) (err error) {
	disk, dir := filepath.Join(b.dir, fs.name), filepath.Join(b.dir, fs.name+"-mounted")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 400<<30), os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	if _, err := command(ctx, fs.mkfs[0], append(fs.mkfs[1:], disk)...); err != nil {
		return err
	}
	if _, err := command(ctx, "mount", "-o", "loop", disk, dir); err != nil {
		return err
	}
	defer func() {
		_, e := command(context.WithoutCancel(ctx), "umount", dir)
		err = errors.Join(err, e, os.Remove(disk), os.Remove(dir))
	}()
	return do(dir)
}

// ioRaw does not remove the raw file.
func (b *bench) ioRaw(ctx context.Context, raw string) (*ioTarget, error) {
	device, end, err := onLoop(ctx, raw)
	return &ioTarget{"raw file on loop", device, end}, err
}

// ioPassThrough serves a copy of a raw file in a process of its own.
func (b *bench) ioPassThrough(ctx context.Context, raw string) (*ioTarget, error) {
	path := filepath.Join(b.dir, "pass.raw")
	if _, err := command(ctx, "cp", "--sparse=never", raw, path); err != nil {
		return nil, err
	}
	p, err := startServer("/proc/self/exe", "-pass-through", path)
	if err != nil {
		return nil, err
	}
	return &ioTarget{"pass-through", p.line, func() error { return errors.Join(p.stop(), os.Remove(path)) }}, nil
}

// ioOurs serves a copy of an image in an engine.
func (b *bench) ioOurs(ctx context.Context, image string) (*ioTarget, error) {
	size, err := imageSize(image)
	if err != nil {
		return nil, err
	}
	v, err := b.attach(ctx, b.dir, size, func(path string) error { return copyImage(ctx, image, path) })
	if err != nil {
		return nil, err
	}
	return &ioTarget{"ours", v.device, v.end}, nil
}

// ioQEMU serves a copy of an image in qemu-storage-daemon, with direct I/O and io_uring.
func (b *bench) ioQEMU(ctx context.Context, image string) (*ioTarget, error) {
	dir, err := os.MkdirTemp(b.dir, "qemu")
	if err != nil {
		return nil, err
	}
	path, export := filepath.Join(dir, "image"), filepath.Join(dir, "export")
	if err := errors.Join(copyImage(ctx, image, path), os.WriteFile(export, nil, 0o600)); err != nil {
		return nil, err
	}
	size, err := imageSize(image)
	if err != nil {
		return nil, err
	}
	server, err := startServer("qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=file,discard=unmap,aio=io_uring,cache.direct=on,filename="+path,
		"--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap,cache.direct=on",
		"--export", "type=fuse,id=export,node-name=disk,writable=on,mountpoint="+export)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(30 * time.Second); ; <-time.After(10 * time.Millisecond) {
		if st, err := os.Stat(export); err == nil && st.Size() == size {
			break
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(errors.New("qemu-storage-daemon has no export"), server.stop())
		}
	}
	device, end, err := onLoop(ctx, export)
	if err != nil {
		return nil, errors.Join(err, server.stop())
	}
	return &ioTarget{"QEMU", device, func() error { return errors.Join(end(), server.stop(), os.RemoveAll(dir)) }}, nil
}

// convert makes a fully mapped image of a raw file.
func convert(ctx context.Context, raw, image string) error {
	_, err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, image)
	return err
}

// copyImage copies a file, its holes as holes, to the disk.
func copyImage(ctx context.Context, from, to string) error {
	if _, err := command(ctx, "cp", "--sparse=auto", from, to); err != nil {
		return err
	}
	_, err := command(ctx, "sync", to)
	return err
}

// imageSize returns the size of an image's disk.
func imageSize(path string) (size int64, err error) {
	f, err := qcow2.OpenFile(path, true)
	if err != nil {
		return 0, err
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	if err != nil {
		return 0, errors.Join(err, f.Close())
	}
	size = img.Size()
	return size, img.Close()
}

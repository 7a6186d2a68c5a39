package main

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// disk moves bytes between memory and the host's disk, past the page cache: no operation can be faster than that.
type disk struct {
	f      *os.File
	b      []byte
	l2, rc int64 // bytes of all L2 tables and all refcount blocks of the disk's image
}

const directBytes = 1 << 20

// newDisk makes a file to read from and write to that has the metadata's size of a fully mapped disk of 64 KiB clusters.
func newDisk(dir, size string) (*disk, error) {
	n, err := parseSize(size)
	if err != nil {
		return nil, err
	}
	d := &disk{l2: n / 8192, rc: n / 32768}
	d.f, err = os.OpenFile(filepath.Join(dir, "metadata"), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_DIRECT, 0o600)
	if err != nil {
		return nil, err
	}
	// O_DIRECT wants aligned memory.
	d.b, err = unix.Mmap(-1, 0, directBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	for i := range d.b {
		d.b[i] = byte(i * 7)
	}
	if err == nil {
		err = d.move(d.f.WriteAt, 2*d.l2+d.rc)
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *disk) close() error {
	return errors.Join(unix.Munmap(d.b), d.f.Close(), os.Remove(d.f.Name()))
}

func (d *disk) move(call func([]byte, int64) (int, error), n int64) error {
	for off := int64(0); off < n; off += directBytes {
		if _, err := call(d.b[:min(directBytes, n-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// transfer moves what a step needs, with the two syncs of one that writes.
func (d *disk) transfer(s step) (time.Duration, error) {
	start := time.Now()
	if err := d.move(d.f.ReadAt, s.readL2*d.l2+s.readRC*d.rc); err != nil {
		return 0, err
	}
	if s.name != "check" {
		if err := d.move(d.f.WriteAt, s.wrteL2*d.l2+s.wrteRC*d.rc); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return 0, err
		}
		if _, err := d.f.WriteAt(d.b[:4096], 0); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}

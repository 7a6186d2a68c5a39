package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// ReadAt reads len(p) bytes of the active disk at off, all of them or an error.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	if err := img.begin(off, int64(len(p)), false); err != nil {
		return 0, err
	}
	defer img.end()
	done := 0
	err := img.g.Chunks(format.GuestOffset(off), int64(len(p)), func(c format.Chunk) error {
		unlock := img.lock(c, false)
		defer unlock()
		es, err := img.entries(c)
		if err == nil {
			err = img.readEntries(p[done:done+int(c.N)], c.Off, es)
		}
		if err == nil {
			done += int(c.N)
		}
		return err
	})
	return done, img.judge(err)
}

// readEntries fills p with guest bytes from off on, which entries es map. Neighbouring host clusters are read
// together.
func (img *Image) readEntries(p []byte, off format.GuestOffset, es []format.L2Entry) error {
	for len(p) > 0 {
		in := img.g.InCluster(off)
		k := 1
		for k < len(es) && follows(es[k-1], es[k], img.g) {
			k++
		}
		n := int(min(img.g.Bytes(int64(k))-in, int64(len(p))))
		if err := img.readRun(p[:n], in, es[0]); err != nil {
			return fmt.Errorf("%s: read guest offset %#x: %w", img.f.Name(), off, err)
		}
		p, off, es = p[n:], off.Plus(int64(n)), es[k:]
	}
	return nil
}

// follows tells whether b can be read together with a, the entry before it.
func follows(a, b format.L2Entry, g format.Geometry) bool {
	switch {
	case a.Kind().ReadsZero():
		return b.Kind().ReadsZero()
	case a.Kind() == format.KindData:
		return b.Kind() == format.KindData && b.Offset() == a.Offset().Plus(g.ClusterSize)
	}
	return false
}

// readRun reads from in bytes into the host clusters that begin with e.
func (img *Image) readRun(p []byte, in int64, e format.L2Entry) error {
	switch e.Kind() {
	case format.KindData:
		return img.readData(p, e.Offset().Plus(in))
	case format.KindMixed:
		return img.readMixed(p, in, e)
	case format.KindCompressed:
		cluster := make([]byte, img.g.ClusterSize)
		if err := img.readCompressed(cluster, e); err != nil {
			return err
		}
		copy(p, cluster[in:])
	default:
		clear(p)
	}
	return nil
}

// readData reads data clusters. The file's last cluster may be cut, and the rest of it is zeros. One that lies behind the end was
// lost: ErrCorrupt.
func (img *Image) readData(p []byte, off format.HostOffset) error {
	n, err := img.f.ReadAt(p, int64(off))
	if err == nil || n == len(p) {
		return nil
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	length, err := img.f.Size()
	if err != nil {
		return err
	}
	if last := img.g.Offset(img.g.Cluster(off.Plus(int64(len(p)) - 1))); int64(last) >= format.RoundToSectors(length) {
		return fmt.Errorf("%w: the data cluster at file offset %#x is behind the end of the file, which has %d bytes: it was cut short",
			ErrCorrupt, last, length)
	}
	clear(p[n:])
	return nil
}

// readMixed reads the subclusters that hold data; the others are zeros.
func (img *Image) readMixed(p []byte, in int64, e format.L2Entry) error {
	for len(p) > 0 {
		n, allocated := e.SubRun(img.g, in)
		n = min(n, int64(len(p)))
		if !allocated {
			clear(p[:n])
		} else if err := img.readData(p[:n], e.Offset().Plus(in)); err != nil {
			return err
		}
		p, in = p[n:], in+n
	}
	return nil
}

func (img *Image) readCompressed(cluster []byte, e format.L2Entry) error {
	off, n := e.Compressed(img.g)
	src := make([]byte, n)
	if err := format.ReadPadded(img.f, src, off); err != nil {
		return err
	}
	if err := img.packed.Decompress(cluster, src); err != nil {
		return fmt.Errorf("compressed cluster at file offset %#x: %w", off, err)
	}
	return nil
}

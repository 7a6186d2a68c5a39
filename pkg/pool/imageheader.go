package pool

import (
	"encoding/binary"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// openImage opens an image to look at it, whoever writes to it.
func openImage(d dir, image string) (*os.File, error) {
	if err := d.expect(image, 0); err != nil {
		return nil, err
	}
	return d.OpenFile(image, os.O_RDONLY|unix.O_NONBLOCK, 0)
}

// imageHeader is what the pool needs to know of an image. The zero value is that of what is no image.
type imageHeader struct {
	size        int64 // virtual bytes
	clusterBits uint32
	extendedL2  bool
	snapshots   bool // it has some
}

// readImageHeader reads the size of a disk and its layout, which an attached image can be read for at any moment: its header is
// only ever replaced by one write of a sector.
func readImageHeader(image io.ReaderAt) imageHeader {
	b := make([]byte, 80)
	if n, _ := image.ReadAt(b, 0); n < 32 || string(b[:4]) != "QFI\xfb" {
		return imageHeader{}
	}
	return imageHeader{
		size:        max(0, int64(binary.BigEndian.Uint64(b[24:]))),
		clusterBits: binary.BigEndian.Uint32(b[20:]),
		extendedL2:  binary.BigEndian.Uint32(b[4:]) >= 3 && binary.BigEndian.Uint64(b[72:])&(1<<4) != 0,
		snapshots:   binary.BigEndian.Uint32(b[60:]) > 0,
	}
}

// reserveClusters is how many clusters a deletion needs besides L2 entries and reference counts, at most.
const reserveClusters = 16

// deletionNeed returns how many bytes the deletion of a snapshot may write on a file system of total bytes before it frees any:
// an L2 entry for each cluster of the disk, a reference count for each of the file. Zero for what is not to be found out.
func (h imageHeader) deletionNeed(total int64) int64 {
	if h.clusterBits < 9 || h.clusterBits > 21 {
		return 0
	}
	entry := int64(8)
	if h.extendedL2 {
		entry = 16
	}
	return h.size>>h.clusterBits*entry + total>>h.clusterBits*2 + reserveClusters<<h.clusterBits
}

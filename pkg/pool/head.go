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

// head is what the head of an image says. The zero value is that of what is no image.
type head struct {
	size        int64 // virtual bytes
	clusterBits uint32
	extendedL2  bool
	snapshots   bool // it has some
}

// readHead reads the size of a disk and its layout, which an attached image can be read for at any moment: its head is
// only ever replaced by one write of a sector.
func readHead(image io.ReaderAt) head {
	b := make([]byte, 80)
	if n, _ := image.ReadAt(b, 0); n < 32 || string(b[:4]) != "QFI\xfb" {
		return head{}
	}
	return head{
		size:        max(0, int64(binary.BigEndian.Uint64(b[24:]))),
		clusterBits: binary.BigEndian.Uint32(b[20:]),
		extendedL2:  binary.BigEndian.Uint32(b[4:]) >= 3 && binary.BigEndian.Uint64(b[72:])&(1<<4) != 0,
		snapshots:   binary.BigEndian.Uint32(b[60:]) > 0,
	}
}

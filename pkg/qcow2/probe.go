package qcow2

import (
	"io"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Header is what an image's header says, whether or not the image can be opened. The zero value
// is that of no image, of size 0.
type Header struct{ h format.Header }

// Probe reads the first sector of an image. It may do so while somebody else writes to the image, at any moment: the header is only
// ever replaced by one write of that sector. ErrUnsupported if it is no image, or of no known version; ErrCorrupt or ErrLimit for
// what no image can have. Features that Open refuses are not looked at.
func Probe(f io.ReaderAt) (Header, error) {
	b := make([]byte, format.SectorSize)
	if err := format.ReadPadded(f, b, 0); err != nil {
		return Header{}, err
	}
	h, err := format.PeekHeader(b)
	if err != nil {
		return Header{}, err
	}
	return Header{h}, nil
}

// Size returns the size of the active disk in bytes.
func (h Header) Size() int64 { return h.h.Size }

// HasSnapshots tells whether the image has any.
func (h Header) HasSnapshots() bool { return h.h.Snapshots > 0 }

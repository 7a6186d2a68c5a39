package format

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Source is a file that metadata is read from.
type Source interface {
	io.ReaderAt
	// Size returns the length in bytes.
	Size() (int64, error)
}

// ReadPadded fills p from off on; what lies beyond the end of the file is zeros, for the last cluster may be cut.
func ReadPadded(f io.ReaderAt, p []byte, off HostOffset) error {
	if len(p) == 0 {
		return nil // off may be anything: that of a table without entries
	}
	n, err := f.ReadAt(p, int64(off))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// ReadHeader reads and decodes the header, whose extensions may fill the first cluster.
func ReadHeader(f io.ReaderAt, decode func([]byte) (Header, error)) (Header, error) {
	b := make([]byte, SectorSize)
	if err := ReadPadded(f, b, 0); err != nil {
		return Header{}, err
	}
	if bits := binary.BigEndian.Uint32(b[20:]); bits > MinClusterBits && bits <= MaxClusterBits {
		b = make([]byte, 1<<bits)
		if err := ReadPadded(f, b, 0); err != nil {
			return Header{}, err
		}
	}
	return decode(b)
}

// ReadL1 reads a table of entries L1 entries. What follows from it is bounded by the file, whatever the header claims. Some writers
// leave the active table out at the end of the file if it is zeros. With missing set it may be so; else it is ErrCorrupt, for a file
// that was cut short looks the same.
func ReadL1(f Source, g Geometry, off HostOffset, entries int64, missing bool) ([]L1Entry, error) {
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	if !missing && entries > 0 && int64(off)+entries*8-length >= g.ClusterSize { // the file's last cluster may be cut, or missing if it is zeros
		return nil, fmt.Errorf("%w: %d entries at file offset %#x reach beyond the end of the file", ErrCorrupt, entries, off)
	}
	b := make([]byte, entries*8)
	if err := ReadPadded(f, b, off); err != nil {
		return nil, err
	}
	l1 := DecodeL1(b)
	// Each L2 table is a cluster of the file, and no two entries share one: to walk the table must not take longer
	// than the file is.
	used := int64(0)
	for _, e := range l1 {
		if e.Offset() != 0 {
			used++
		}
	}
	if used > g.Clusters(length) {
		return nil, fmt.Errorf("%w: %d entries at file offset %#x share L2 tables, the file has %d clusters", ErrCorrupt, used, off, g.Clusters(length))
	}
	return l1, nil
}

// ReadL2 reads the L2 table at off.
func ReadL2(f Source, g Geometry, off HostOffset) (L2Table, error) {
	t := g.NewTable()
	return t, t.Read(f, off)
}

func (t L2Table) Read(f Source, off HostOffset) error {
	length, err := f.Size()
	if err != nil {
		return err
	}
	if int64(off) >= length {
		return fmt.Errorf("%w: L2 table at file offset %#x, beyond the end of the file", ErrCorrupt, off)
	}
	if err := ReadPadded(f, t.B, off); err != nil {
		return fmt.Errorf("read the L2 table at file offset %#x: %w", off, err)
	}
	return nil
}

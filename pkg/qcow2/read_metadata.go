package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// source is a file that metadata is read from.
type source interface {
	io.ReaderAt
	// Size returns the length in bytes.
	Size() (int64, error)
}

// readPadded fills p from off on; what lies beyond the end of the file is zeros, for the last cluster may be cut.
func readPadded(f io.ReaderAt, p []byte, off int64) error {
	if len(p) == 0 {
		return nil // off may be anything: that of a table without entries
	}
	n, err := f.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// readHeader reads and decodes the header, whose extensions may fill the first cluster.
func readHeader(f io.ReaderAt, decode func([]byte) (header, error)) (header, error) {
	b := make([]byte, sectorSize)
	if err := readPadded(f, b, 0); err != nil {
		return header{}, err
	}
	if bits := binary.BigEndian.Uint32(b[20:]); bits > minClusterBits && bits <= maxClusterBits {
		b = make([]byte, 1<<bits)
		if err := readPadded(f, b, 0); err != nil {
			return header{}, err
		}
	}
	return decode(b)
}

// readL1 reads a table of entries L1 entries. What follows from it is bounded by the file, whatever the header claims. Some writers
// leave the active table out at the end of the file if it is zeros. With missing set it may be so; else it is ErrCorrupt, for a file
// that was cut short looks the same.
func readL1(f source, g geometry, off, entries int64, missing bool) ([]l1Entry, error) {
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	if !missing && entries > 0 && off+entries*8-length >= g.clusterSize { // the file's last cluster may be cut, or missing if it is zeros
		return nil, fmt.Errorf("%w: %d entries at file offset %#x reach beyond the end of the file", ErrCorrupt, entries, off)
	}
	b := make([]byte, entries*8)
	if err := readPadded(f, b, off); err != nil {
		return nil, err
	}
	l1 := decodeL1(b)
	// Each L2 table is a cluster of the file, and no two entries share one: to walk the table must not take longer
	// than the file is.
	used := int64(0)
	for _, e := range l1 {
		if e.offset() != 0 {
			used++
		}
	}
	if used > g.clusters(length) {
		return nil, fmt.Errorf("%w: %d entries at file offset %#x share L2 tables, the file has %d clusters", ErrCorrupt, used, off, g.clusters(length))
	}
	return l1, nil
}

// readL2 reads the L2 table at off.
func readL2(f source, g geometry, off int64) (table, error) {
	t := g.newTable()
	return t, t.read(f, off)
}

func (t table) read(f source, off int64) error {
	length, err := f.Size()
	if err != nil {
		return err
	}
	if off >= length {
		return fmt.Errorf("%w: L2 table at file offset %#x, beyond the end of the file", ErrCorrupt, off)
	}
	if err := readPadded(f, t.b, off); err != nil {
		return fmt.Errorf("read the L2 table at file offset %#x: %w", off, err)
	}
	return nil
}

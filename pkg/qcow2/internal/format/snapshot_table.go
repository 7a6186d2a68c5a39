package format

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// Parts of a snapshot table's row.
const (
	SnapshotRowBytes   = 40 // the fixed part of a row
	SnapshotExtraBytes = 24 // the extra data that has a meaning: VM state size, disk size, icount

	// UnknownIcount is stored when nobody counted instructions.
	UnknownIcount = math.MaxUint64
)

// SnapshotRow is one row of the snapshot table (specification: "Snapshots"). Fields that only pass
// through are kept as they are on disk.
type SnapshotRow struct {
	L1Offset    HostOffset // bytes 0-7
	L1Size      int64      // bytes 8-11: entries
	ID          string     // its length is in bytes 12-13
	Name        string     // its length is in bytes 14-15
	DateSec     uint32     // bytes 16-19: since 1970
	DateNsec    uint32     // bytes 20-23
	VMClock     uint64     // bytes 24-31: nanoseconds
	VMStateSize uint64     // bytes 32-35, or 64 bits in extra data 0-7
	DiskSize    int64      // extra data 8-15: virtual bytes
	Icount      uint64     // extra data 16-23
	Extra       []byte     // extra data from byte 24 on, meaning unknown, kept

	ExtraSize int64 // bytes 36-39: extra data as read, before EncodeSnapshotTable completes it
}

// Check refuses a row that cannot be used.
func (r *SnapshotRow) Check(g Geometry) error {
	switch {
	case r.L1Size > MaxL1Bytes/8:
		return fmt.Errorf("%w: L1 table of %d entries", ErrLimit, r.L1Size)
	case !g.Aligned(r.L1Offset) || r.L1Size > 0 && uint64(r.L1Offset) >= MaxHostOffset:
		return fmt.Errorf("%w: L1 table at offset %#x", ErrCorrupt, uint64(r.L1Offset))
	case r.L1Size > 0 && r.L1Offset == 0:
		return fmt.Errorf("%w: L1 table at offset 0, in the header", ErrCorrupt)
	case r.DiskSize < 0:
		return fmt.Errorf("%w: disk of %d bytes", ErrCorrupt, uint64(r.DiskSize))
	}
	return nil
}

// ReadSnapshotTable reads and checks the table that h names. It returns the rows and how many bytes
// they take up. What the table claims is never allocated before it was read.
func ReadSnapshotTable(f io.ReaderAt, h *Header) ([]SnapshotRow, int64, error) {
	rows, size, err := ScanSnapshotTable(f, h)
	if err != nil {
		return nil, 0, err
	}
	g := h.Geometry()
	for i := range rows {
		if err := rows[i].Check(g); err != nil {
			return nil, 0, fmt.Errorf("snapshot table at offset %#x, row %d (id %q, name %q): %w",
				h.SnapshotsOffset, i, rows[i].ID, rows[i].Name, err)
		}
	}
	return rows, size, nil
}

// ScanSnapshotTable is ReadSnapshotTable without the check of each row, for the checker, which
// reports what it finds and goes on.
func ScanSnapshotTable(f io.ReaderAt, h *Header) ([]SnapshotRow, int64, error) {
	if h.Snapshots > MaxSnapshots {
		return nil, 0, fmt.Errorf("%w: %d snapshots", ErrLimit, h.Snapshots)
	}
	return NewSnapshotReader(f, h).Rows(h)
}

// SnapshotReader decodes rows from a stream that begins with the table.
type SnapshotReader struct {
	r        *bufio.Reader
	at       int64 // bytes consumed
	diskSize int64 // for rows that do not say
	Shorten  bool  // what is too much extra data, instead of refusing it
}

// NewSnapshotReader reads the table that h names.
func NewSnapshotReader(f io.ReaderAt, h *Header) *SnapshotReader {
	return &SnapshotReader{
		r:        bufio.NewReaderSize(io.NewSectionReader(f, int64(h.SnapshotsOffset), math.MaxInt64-int64(h.SnapshotsOffset)), 64<<10),
		diskSize: h.Size,
	}
}

// Rows decodes the table of h and returns how many bytes it takes up. With an error it returns the rows before.
func (t *SnapshotReader) Rows(h *Header) ([]SnapshotRow, int64, error) {
	var rows []SnapshotRow
	for i := range min(h.Snapshots, MaxSnapshots) {
		start := h.SnapshotsOffset.Plus(Align8(t.at))
		row, err := t.next()
		if err == nil && t.at > MaxSnapshotTableBytes {
			err = fmt.Errorf("%w: the table is larger than %d MiB", ErrLimit, MaxSnapshotTableBytes>>20)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: the file ends in it", ErrCorrupt)
		}
		if err != nil {
			return rows, t.at, fmt.Errorf("snapshot table row %d of %d at offset %#x: %w", i, h.Snapshots, start, err)
		}
		rows = append(rows, row)
	}
	return rows, t.at, nil
}

// next decodes the row at the next multiple of 8.
func (t *SnapshotReader) next() (SnapshotRow, error) {
	if err := t.read(make([]byte, Align8(t.at)-t.at)); err != nil {
		return SnapshotRow{}, err
	}
	var b [SnapshotRowBytes]byte
	if err := t.read(b[:]); err != nil {
		return SnapshotRow{}, err
	}
	row := SnapshotRow{
		L1Offset:    HostOffset(binary.BigEndian.Uint64(b[0:])),
		L1Size:      int64(binary.BigEndian.Uint32(b[8:])),
		DateSec:     binary.BigEndian.Uint32(b[16:]),
		DateNsec:    binary.BigEndian.Uint32(b[20:]),
		VMClock:     binary.BigEndian.Uint64(b[24:]),
		VMStateSize: uint64(binary.BigEndian.Uint32(b[32:])),
		DiskSize:    t.diskSize,
		Icount:      UnknownIcount,
		ExtraSize:   int64(binary.BigEndian.Uint32(b[36:])),
	}
	if err := t.readExtra(&row); err != nil {
		return SnapshotRow{}, err
	}
	names := make([]byte, int(binary.BigEndian.Uint16(b[12:]))+int(binary.BigEndian.Uint16(b[14:])))
	if err := t.read(names); err != nil {
		return SnapshotRow{}, err
	}
	idLen := binary.BigEndian.Uint16(b[12:])
	row.ID, row.Name = string(names[:idLen]), string(names[idLen:])
	return row, nil
}

func (t *SnapshotReader) readExtra(row *SnapshotRow) error {
	if row.ExtraSize > MaxSnapshotExtraBytes && !t.Shorten {
		return fmt.Errorf("%w: %d bytes of extra data, at most %d", ErrLimit, row.ExtraSize, MaxSnapshotExtraBytes)
	}
	extra := make([]byte, min(row.ExtraSize, MaxSnapshotExtraBytes))
	if err := t.read(extra); err != nil {
		return err
	}
	if err := t.skip(row.ExtraSize - int64(len(extra))); err != nil {
		return err
	}
	if len(extra) >= 8 {
		row.VMStateSize = binary.BigEndian.Uint64(extra)
	}
	if len(extra) >= 16 {
		row.DiskSize = int64(binary.BigEndian.Uint64(extra[8:]))
	}
	if len(extra) >= SnapshotExtraBytes {
		row.Icount = binary.BigEndian.Uint64(extra[16:])
		row.Extra = extra[SnapshotExtraBytes:]
	}
	return nil
}

func (t *SnapshotReader) read(p []byte) error {
	n, err := io.ReadFull(t.r, p)
	t.at += int64(n)
	return err
}

func (t *SnapshotReader) skip(n int64) error {
	if t.at+n > MaxSnapshotTableBytes {
		return fmt.Errorf("%w: the table is larger than %d MiB", ErrLimit, MaxSnapshotTableBytes>>20)
	}
	n, err := io.CopyN(io.Discard, t.r, n)
	t.at += n
	return err
}

// EncodeSnapshotTable returns the table of rows, each with at least 24 bytes of extra data. ErrLimit:
// QEMU, and ReadSnapshotTable, would refuse it.
func EncodeSnapshotTable(rows []SnapshotRow) ([]byte, error) {
	if len(rows) > MaxSnapshots {
		return nil, fmt.Errorf("%w: %d snapshots", ErrLimit, len(rows))
	}
	var b []byte
	for i := range rows {
		row := &rows[i]
		extraSize := SnapshotExtraBytes + len(row.Extra)
		if len(row.ID) > math.MaxUint16 || len(row.Name) > math.MaxUint16 || extraSize > MaxSnapshotExtraBytes {
			return nil, fmt.Errorf("%w: snapshot row with %d bytes of id, %d of name, %d of extra data",
				ErrLimit, len(row.ID), len(row.Name), extraSize)
		}
		b = append(b, make([]byte, Align8(int64(len(b)))-int64(len(b)))...)
		b = row.append(b)
		if len(b) > MaxSnapshotTableBytes {
			return nil, fmt.Errorf("%w: the snapshot table would be larger than %d MiB", ErrLimit, MaxSnapshotTableBytes>>20)
		}
	}
	return b, nil
}

// append adds the row's bytes to b.
func (r *SnapshotRow) append(b []byte) []byte {
	var small uint32 // the 32-bit field is 0 if the size does not fit
	if r.VMStateSize <= math.MaxUint32 {
		small = uint32(r.VMStateSize)
	}
	be := binary.BigEndian
	b = be.AppendUint64(b, uint64(r.L1Offset))
	b = be.AppendUint32(b, uint32(r.L1Size))
	b = be.AppendUint16(b, uint16(len(r.ID)))
	b = be.AppendUint16(b, uint16(len(r.Name)))
	b = be.AppendUint32(b, r.DateSec)
	b = be.AppendUint32(b, r.DateNsec)
	b = be.AppendUint64(b, r.VMClock)
	b = be.AppendUint32(b, small)
	b = be.AppendUint32(b, uint32(SnapshotExtraBytes+len(r.Extra)))
	b = be.AppendUint64(b, r.VMStateSize)
	b = be.AppendUint64(b, uint64(r.DiskSize))
	b = be.AppendUint64(b, r.Icount)
	b = append(b, r.Extra...)
	b = append(b, r.ID...)
	return append(b, r.Name...)
}

// Align8 rounds up to the alignment of rows in the snapshot table and of header extensions.
func Align8(n int64) int64 { return (n + 7) &^ 7 }

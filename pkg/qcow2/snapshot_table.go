package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	snapshotRowBytes   = 40 // the fixed part of a row
	snapshotExtraBytes = 24 // the extra data that has a meaning: VM state size, disk size, icount

	// unknownIcount is stored when nobody counted instructions.
	unknownIcount = math.MaxUint64
)

// snapshotRow is one row of the snapshot table (specification: "Snapshots"). Fields that only pass
// through are kept as they are on disk.
type snapshotRow struct {
	l1Offset    int64  // bytes 0-7
	l1Size      int64  // bytes 8-11: entries
	id          string // its length is in bytes 12-13
	name        string // its length is in bytes 14-15
	dateSec     uint32 // bytes 16-19: since 1970
	dateNsec    uint32 // bytes 20-23
	vmClock     uint64 // bytes 24-31: nanoseconds
	vmStateSize uint64 // bytes 32-35, or 64 bits in extra data 0-7
	diskSize    int64  // extra data 8-15: virtual bytes
	icount      uint64 // extra data 16-23
	extra       []byte // extra data from byte 24 on, meaning unknown, kept

	extraSize int64 // bytes 36-39: extra data as read, before encode completes it
}

// check refuses a row that cannot be used.
func (r *snapshotRow) check(g geometry) error {
	switch {
	case r.l1Size > maxL1Bytes/8:
		return fmt.Errorf("%w: L1 table of %d entries", ErrLimit, r.l1Size)
	case !g.aligned(r.l1Offset) || r.l1Size > 0 && uint64(r.l1Offset) >= maxHostOffset:
		return fmt.Errorf("%w: L1 table at offset %#x", ErrCorrupt, uint64(r.l1Offset))
	case r.l1Size > 0 && r.l1Offset == 0:
		return fmt.Errorf("%w: L1 table at offset 0, in the header", ErrCorrupt)
	case r.diskSize < 0:
		return fmt.Errorf("%w: disk of %d bytes", ErrCorrupt, uint64(r.diskSize))
	}
	return nil
}

// readSnapshotTable reads and checks the table that h names. It returns the rows and how many bytes
// they take up. What the table claims is never allocated before it was read.
func readSnapshotTable(f io.ReaderAt, h *header) ([]snapshotRow, int64, error) {
	rows, size, err := scanSnapshotTable(f, h)
	if err != nil {
		return nil, 0, err
	}
	g := h.geometry()
	for i := range rows {
		if err := rows[i].check(g); err != nil {
			return nil, 0, fmt.Errorf("snapshot table at offset %#x, row %d (id %q, name %q): %w",
				h.snapshotsOffset, i, rows[i].id, rows[i].name, err)
		}
	}
	return rows, size, nil
}

// scanSnapshotTable is readSnapshotTable without the check of each row, for the checker, which
// reports what it finds and goes on.
func scanSnapshotTable(f io.ReaderAt, h *header) ([]snapshotRow, int64, error) {
	if h.snapshots > maxSnapshots {
		return nil, 0, fmt.Errorf("%w: %d snapshots", ErrLimit, h.snapshots)
	}
	return newSnapshotReader(f, h).rows(h)
}

// snapshotReader decodes rows from a stream that begins with the table.
type snapshotReader struct {
	r        *bufio.Reader
	at       int64 // bytes consumed
	diskSize int64 // for rows that do not say
	shorten  bool  // what is too much extra data, instead of refusing it
}

func newSnapshotReader(f io.ReaderAt, h *header) *snapshotReader {
	return &snapshotReader{
		r:        bufio.NewReaderSize(io.NewSectionReader(f, h.snapshotsOffset, math.MaxInt64-h.snapshotsOffset), 64<<10),
		diskSize: h.size,
	}
}

// rows decodes the table of h and returns how many bytes it takes up. With an error it returns the rows before.
func (t *snapshotReader) rows(h *header) ([]snapshotRow, int64, error) {
	var rows []snapshotRow
	for i := range min(h.snapshots, maxSnapshots) {
		start := h.snapshotsOffset + align8(t.at)
		row, err := t.next()
		if err == nil && t.at > maxSnapshotTableBytes {
			err = fmt.Errorf("%w: the table is larger than %d MiB", ErrLimit, maxSnapshotTableBytes>>20)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: the file ends in it", ErrCorrupt)
		}
		if err != nil {
			return rows, t.at, fmt.Errorf("snapshot table row %d of %d at offset %#x: %w", i, h.snapshots, start, err)
		}
		rows = append(rows, row)
	}
	return rows, t.at, nil
}

// next decodes the row at the next multiple of 8.
func (t *snapshotReader) next() (snapshotRow, error) {
	if err := t.read(make([]byte, align8(t.at)-t.at)); err != nil {
		return snapshotRow{}, err
	}
	var b [snapshotRowBytes]byte
	if err := t.read(b[:]); err != nil {
		return snapshotRow{}, err
	}
	row := snapshotRow{
		l1Offset:    int64(binary.BigEndian.Uint64(b[0:])),
		l1Size:      int64(binary.BigEndian.Uint32(b[8:])),
		dateSec:     binary.BigEndian.Uint32(b[16:]),
		dateNsec:    binary.BigEndian.Uint32(b[20:]),
		vmClock:     binary.BigEndian.Uint64(b[24:]),
		vmStateSize: uint64(binary.BigEndian.Uint32(b[32:])),
		diskSize:    t.diskSize,
		icount:      unknownIcount,
		extraSize:   int64(binary.BigEndian.Uint32(b[36:])),
	}
	if err := t.readExtra(&row); err != nil {
		return snapshotRow{}, err
	}
	names := make([]byte, int(binary.BigEndian.Uint16(b[12:]))+int(binary.BigEndian.Uint16(b[14:])))
	if err := t.read(names); err != nil {
		return snapshotRow{}, err
	}
	idLen := binary.BigEndian.Uint16(b[12:])
	row.id, row.name = string(names[:idLen]), string(names[idLen:])
	return row, nil
}

func (t *snapshotReader) readExtra(row *snapshotRow) error {
	if row.extraSize > maxSnapshotExtraBytes && !t.shorten {
		return fmt.Errorf("%w: %d bytes of extra data, at most %d", ErrLimit, row.extraSize, maxSnapshotExtraBytes)
	}
	extra := make([]byte, min(row.extraSize, maxSnapshotExtraBytes))
	if err := t.read(extra); err != nil {
		return err
	}
	if err := t.skip(row.extraSize - int64(len(extra))); err != nil {
		return err
	}
	if len(extra) >= 8 {
		row.vmStateSize = binary.BigEndian.Uint64(extra)
	}
	if len(extra) >= 16 {
		row.diskSize = int64(binary.BigEndian.Uint64(extra[8:]))
	}
	if len(extra) >= snapshotExtraBytes {
		row.icount = binary.BigEndian.Uint64(extra[16:])
		row.extra = extra[snapshotExtraBytes:]
	}
	return nil
}

func (t *snapshotReader) read(p []byte) error {
	n, err := io.ReadFull(t.r, p)
	t.at += int64(n)
	return err
}

func (t *snapshotReader) skip(n int64) error {
	if t.at+n > maxSnapshotTableBytes {
		return fmt.Errorf("%w: the table is larger than %d MiB", ErrLimit, maxSnapshotTableBytes>>20)
	}
	n, err := io.CopyN(io.Discard, t.r, n)
	t.at += n
	return err
}

// encodeSnapshotTable returns the table of rows, each with at least 24 bytes of extra data. ErrLimit:
// QEMU, and readSnapshotTable, would refuse it.
func encodeSnapshotTable(rows []snapshotRow) ([]byte, error) {
	if len(rows) > maxSnapshots {
		return nil, fmt.Errorf("%w: %d snapshots", ErrLimit, len(rows))
	}
	var b []byte
	for i := range rows {
		row := &rows[i]
		extraSize := snapshotExtraBytes + len(row.extra)
		if len(row.id) > math.MaxUint16 || len(row.name) > math.MaxUint16 || extraSize > maxSnapshotExtraBytes {
			return nil, fmt.Errorf("%w: snapshot row with %d bytes of id, %d of name, %d of extra data",
				ErrLimit, len(row.id), len(row.name), extraSize)
		}
		b = append(b, make([]byte, align8(int64(len(b)))-int64(len(b)))...)
		b = row.append(b)
		if len(b) > maxSnapshotTableBytes {
			return nil, fmt.Errorf("%w: the snapshot table would be larger than %d MiB", ErrLimit, maxSnapshotTableBytes>>20)
		}
	}
	return b, nil
}

// append adds the row's bytes to b.
func (r *snapshotRow) append(b []byte) []byte {
	var small uint32 // the 32-bit field is 0 if the size does not fit
	if r.vmStateSize <= math.MaxUint32 {
		small = uint32(r.vmStateSize)
	}
	be := binary.BigEndian
	b = be.AppendUint64(b, uint64(r.l1Offset))
	b = be.AppendUint32(b, uint32(r.l1Size))
	b = be.AppendUint16(b, uint16(len(r.id)))
	b = be.AppendUint16(b, uint16(len(r.name)))
	b = be.AppendUint32(b, r.dateSec)
	b = be.AppendUint32(b, r.dateNsec)
	b = be.AppendUint64(b, r.vmClock)
	b = be.AppendUint32(b, small)
	b = be.AppendUint32(b, uint32(snapshotExtraBytes+len(r.extra)))
	b = be.AppendUint64(b, r.vmStateSize)
	b = be.AppendUint64(b, uint64(r.diskSize))
	b = be.AppendUint64(b, r.icount)
	b = append(b, r.extra...)
	b = append(b, r.id...)
	return append(b, r.name...)
}

// align8 rounds up to the alignment of rows in the snapshot table and of header extensions.
func align8(n int64) int64 { return (n + 7) &^ 7 }

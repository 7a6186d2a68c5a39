package fsck

import (
	"encoding/binary"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

const (
	bitmapsExtensionBytes   = 24
	bitmapRowBytes          = 24 // the fixed part of a directory row
	maxBitmaps              = 65535
	maxBitmapDirectoryBytes = 1024 * maxBitmaps
	maxBitmapBytes          = 512 << 20 // of one bitmap
	maxBitmapName           = 1023

	bitmapInUse         = 1 << 0 // it is inconsistent
	bitmapFlagsReserved = 0xfffffffc
	bitmapDirty         = 1 // the only type

	bitmapAllOnes  = 1 << 0
	bitmapReserved = 0xff000000000001fe
)

// markBitmaps counts the clusters of the persistent dirty bitmaps (specification: "Bitmaps"). Without the autoclear
// bit the extension is stale and references nothing.
func (c *checker) markBitmaps() error {
	ext := c.h.Bitmaps
	if ext == nil || c.h.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	if len(ext) != bitmapsExtensionBytes {
		c.unusable("the bitmaps extension has %d bytes", len(ext))
		return nil
	}
	count := binary.BigEndian.Uint32(ext)
	size, off := binary.BigEndian.Uint64(ext[8:]), binary.BigEndian.Uint64(ext[16:])
	switch {
	case count == 0 || count > maxBitmaps || size < bitmapRowBytes || size > maxBitmapDirectoryBytes:
		c.unusable("the bitmaps extension has %d bitmaps in a directory of %d bytes", count, size)
		return nil
	case off == 0 || off >= format.MaxHostOffset || !c.g.Aligned(format.HostOffset(off)):
		c.unusable("the bitmap directory is at offset %#x", off)
		return nil
	}
	if !c.reference(origin{use: useBitmapDirectory}, format.HostOffset(off), int64(size), 1) {
		return nil
	}
	directory := make([]byte, 0, min(size, readBytes))
	err := c.scan(format.HostOffset(off), int64(size), func(b []byte, _ int64) error {
		directory = append(directory, b...)
		return nil
	})
	if err != nil {
		return err
	}
	rows, ok := c.bitmapRows(directory, int64(count))
	if !ok {
		return nil
	}
	for i, row := range rows {
		if !c.reference(origin{use: useBitmapTable, index: int64(i)}, row.table, row.entries*8, 1) {
			continue
		}
		if err := c.markBitmapData(row.table, row.entries); err != nil {
			return err
		}
	}
	return nil
}

// unusable notes damage that makes QEMU give up the check.
func (c *checker) unusable(text string, args ...any) {
	c.result.Errors++
	c.corrupt(1, text, args...)
}

// bitmapRow is a row of the bitmap directory.
type bitmapRow struct {
	table   format.HostOffset // of the bitmap table
	entries int64
}

// bitmapRows decodes the directory. It is good as a whole or not at all.
func (c *checker) bitmapRows(directory []byte, count int64) ([]bitmapRow, bool) {
	var rows []bitmapRow
	for i := range count {
		if len(directory) < bitmapRowBytes {
			c.unusable("the bitmap directory ends before row %d of %d", i, count)
			return nil, false
		}
		b := directory
		length := format.Align8(bitmapRowBytes + int64(binary.BigEndian.Uint16(b[18:])) + int64(binary.BigEndian.Uint32(b[20:])))
		if length > int64(len(directory)) {
			c.unusable("the bitmap directory ends within row %d of %d", i, count)
			return nil, false
		}
		directory = directory[length:]
		off, entries := binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint32(b[8:]))
		if off == 0 || off >= format.MaxHostOffset || !c.g.Aligned(format.HostOffset(off)) || entries == 0 || c.g.Bytes(entries) > maxBitmapBytes {
			c.unusable("row %d of the bitmap directory names a table of %d entries at offset %#x", i, entries, off)
			return nil, false
		}
		flags, kind, granularity := binary.BigEndian.Uint32(b[12:]), b[16], b[17]
		name, extra := binary.BigEndian.Uint16(b[18:]), binary.BigEndian.Uint32(b[20:])
		if flags&bitmapFlagsReserved != 0 || kind != bitmapDirty || granularity < 9 || granularity > 31 ||
			name == 0 || name > maxBitmapName || extra != 0 || flags&bitmapInUse == 0 && !covers(c.g.Bytes(entries), granularity, c.h.Size) {
			c.unusable("row %d of the bitmap directory has flags %#x, type %d, granularity %d, %d bytes of name, %d of extra data",
				i, flags, kind, granularity, name, extra)
			return nil, false
		}
		rows = append(rows, bitmapRow{format.HostOffset(off), entries})
	}
	if len(directory) > 0 {
		c.unusable("the bitmap directory goes on after row %d", count-1)
		return nil, false
	}
	return rows, true
}

// covers tells whether a bitmap of n bytes has a bit for each 2^granularity bytes of a disk.
func covers(n int64, granularity uint8, size int64) bool {
	return n*8 >= (size+1<<granularity-1)>>granularity
}

func (c *checker) markBitmapData(tableOffset format.HostOffset, entries int64) error {
	return c.scan(tableOffset, entries*8, func(b []byte, at int64) error {
		for i := 0; i < len(b); i += 8 {
			from := origin{use: useBitmapData, table: tableOffset, index: (at + int64(i)) / 8}
			e := binary.BigEndian.Uint64(b[i:])
			off := format.HostOffset(e & format.OffsetMask)
			switch {
			case e&bitmapReserved != 0 || off != 0 && (e&bitmapAllOnes != 0 || !c.g.Aligned(off)):
				c.corrupt(1, "%s: bitmap table entry %#x", from, e)
			case off != 0:
				c.reference(from, off, c.g.ClusterSize, 1)
			}
		}
		return nil
	})
}

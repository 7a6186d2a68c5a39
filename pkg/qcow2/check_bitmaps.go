package qcow2

import "encoding/binary"

const (
	autoclearBitmaps = 1 << 0 // the bitmaps extension is consistent

	bitmapsExtensionBytes   = 24
	bitmapRowBytes          = 24 // the fixed part of a directory row
	maxBitmaps              = 65535
	maxBitmapDirectoryBytes = 1024 * maxBitmaps
	maxBitmapTableBytes     = 8 << 27

	bitmapAllOnes  = 1 << 0
	bitmapReserved = 0xff000000000001fe
)

// markBitmaps counts the clusters of the persistent dirty bitmaps (specification: "Bitmaps"). Without the autoclear
// bit the extension is stale and references nothing.
func (c *checker) markBitmaps() error {
	ext := c.h.bitmaps
	if ext == nil || c.h.autoclear&autoclearBitmaps == 0 {
		return nil
	}
	if len(ext) != bitmapsExtensionBytes {
		c.corrupt(1, "the bitmaps extension has %d bytes", len(ext))
		return nil
	}
	count := binary.BigEndian.Uint32(ext)
	size, off := binary.BigEndian.Uint64(ext[8:]), binary.BigEndian.Uint64(ext[16:])
	switch {
	case count == 0 || count > maxBitmaps || size < bitmapRowBytes || size > maxBitmapDirectoryBytes:
		c.corrupt(1, "the bitmaps extension has %d bitmaps in a directory of %d bytes", count, size)
		return nil
	case off == 0 || off >= maxHostOffset || !c.g.aligned(int64(off)):
		c.corrupt(1, "the bitmap directory is at offset %#x", off)
		return nil
	}
	if !c.reference(origin{use: useBitmapDirectory}, int64(off), int64(size), 1) {
		return nil
	}
	directory := make([]byte, 0, min(size, readBytes))
	err := c.scan(int64(off), int64(size), func(b []byte, _ int64) error {
		directory = append(directory, b...)
		return nil
	})
	if err != nil {
		return err
	}
	return c.markBitmapTables(directory, int64(count))
}

// markBitmapTables walks the rows of the directory.
func (c *checker) markBitmapTables(directory []byte, count int64) error {
	for i := range count {
		if len(directory) < bitmapRowBytes {
			c.corrupt(1, "the bitmap directory ends before row %d of %d", i, count)
			return nil
		}
		off, entries := binary.BigEndian.Uint64(directory), int64(binary.BigEndian.Uint32(directory[8:]))
		length := align8(bitmapRowBytes + int64(binary.BigEndian.Uint16(directory[18:])) + int64(binary.BigEndian.Uint32(directory[20:])))
		if length > int64(len(directory)) {
			c.corrupt(1, "the bitmap directory ends within row %d of %d", i, count)
			return nil
		}
		directory = directory[length:]
		if off == 0 || off >= maxHostOffset || !c.g.aligned(int64(off)) || entries == 0 || entries*8 > maxBitmapTableBytes {
			c.corrupt(1, "row %d of the bitmap directory names a table of %d entries at offset %#x", i, entries, off)
			continue
		}
		if !c.reference(origin{use: useBitmapTable, index: i}, int64(off), entries*8, 1) {
			continue
		}
		if err := c.markBitmapData(int64(off), entries); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) markBitmapData(tableOffset, entries int64) error {
	return c.scan(tableOffset, entries*8, func(b []byte, at int64) error {
		for i := 0; i < len(b); i += 8 {
			from := origin{use: useBitmapData, table: tableOffset, index: (at + int64(i)) / 8}
			e := binary.BigEndian.Uint64(b[i:])
			off := int64(e & offsetMask)
			switch {
			case e&bitmapReserved != 0 || off != 0 && (e&bitmapAllOnes != 0 || !c.g.aligned(off)):
				c.corrupt(1, "%s: bitmap table entry %#x", from, e)
			case off != 0:
				c.reference(from, off, c.g.clusterSize, 1)
			}
		}
		return nil
	})
}

package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// layout is the plan of an image that is written from scratch: header, refcount table, refcount blocks, L1 table, L2
// tables and data clusters, in that order and each counted once.
type layout struct {
	g       geometry
	version int
	size    int64 // of the disk, bytes
	l1Size  int64 // entries

	// Clusters of each part.
	refTable, refBlocks, l1, l2, data int64
}

// newLayout plans an image with room for l2 tables and data clusters.
func newLayout(g geometry, version int, size, l2, data int64) (layout, error) {
	l := layout{g: g, version: version, size: size, l1Size: max(g.l1Entries(size), 1), l2: l2, data: data}
	if l.l1Size > maxL1Bytes/8 {
		return l, fmt.Errorf("%w: a disk of %d bytes with clusters of %d needs more than %d MiB of L1 table; use larger clusters",
			ErrLimit, size, g.clusterSize, maxL1Bytes>>20)
	}
	l.l1 = g.clusters(l.l1Size * 8)
	for l.refBlocks<<g.blockBits < l.clusters() || l.refTable<<g.clusterBits < l.refBlocks*8 {
		l.refBlocks = (l.clusters() + g.blockCounts - 1) >> g.blockBits
		l.refTable = g.clusters(l.refBlocks * 8)
	}
	if l.refTable<<g.clusterBits > maxRefcountTableBytes {
		return l, fmt.Errorf("%w: the refcount table would exceed %d MiB; use larger clusters", ErrLimit, maxRefcountTableBytes>>20)
	}
	return l, nil
}

// File offsets of the parts, in bytes.

func (l layout) refBlocksAt() int64 { return (1 + l.refTable) << l.g.clusterBits }
func (l layout) l1At() int64        { return l.refBlocksAt() + l.refBlocks<<l.g.clusterBits }
func (l layout) l2At() int64        { return l.l1At() + l.l1<<l.g.clusterBits }
func (l layout) dataAt() int64      { return l.l2At() + l.l2<<l.g.clusterBits }

// clusters is the length of the image.
func (l layout) clusters() int64 { return 1 + l.refTable + l.refBlocks + l.l1 + l.l2 + l.data }

// writeRefcounts sets the length of f, an empty file, and writes the refcount table and its blocks.
func (l layout) writeRefcounts(f File) error {
	if err := f.Truncate(l.clusters() << l.g.clusterBits); err != nil {
		return err
	}
	table := make([]byte, l.refTable<<l.g.clusterBits)
	for i := range l.refBlocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64(l.refBlocksAt()+i<<l.g.clusterBits))
	}
	w := newMetadataWriter(f, l.g.clusterSize)
	_, _ = w.Write(table) // Flush tells
	for left := l.clusters(); left > 0; left -= l.g.blockCounts {
		block := l.g.newCounts(1)
		for i := range min(left, l.g.blockCounts) {
			block.set(i, 1)
		}
		_, _ = w.Write(block.b)
	}
	return w.Flush()
}

// writeHeader writes what makes the file an image, all else being there. It syncs before and after.
func (l layout) writeHeader(f File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	h := header{
		version: l.version, clusterBits: l.g.clusterBits, size: l.size,
		l1Size: l.l1Size, l1Offset: l.l1At(), refTableOffset: l.g.clusterSize, refTableClusters: l.refTable,
	}
	be := binary.BigEndian
	be.PutUint32(h.sector[0:], magic)
	be.PutUint32(h.sector[4:], uint32(h.version))
	be.PutUint32(h.sector[20:], uint32(h.clusterBits))
	if h.version >= 3 {
		if l.g.extended {
			h.incompatible = incompatExtendedL2
		}
		be.PutUint32(h.sector[96:], uint32(l.g.refcountOrder))
		be.PutUint32(h.sector[100:], headerLengthV3)
	}
	if _, err := f.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	return f.Sync()
}

// newMetadataWriter writes to f in sequence, in large pieces, from off on.
func newMetadataWriter(f File, off int64) *bufio.Writer {
	return bufio.NewWriterSize(io.NewOffsetWriter(f, off), 1<<20)
}

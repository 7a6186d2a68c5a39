package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// layout is the plan of an image that is written from scratch: header, refcount table, refcount blocks, L1 table, L2
// tables and data clusters, in that order and each counted once.
type layout struct {
	g       format.Geometry
	version int
	size    int64 // of the disk, bytes
	l1Size  int64 // entries

	// Clusters of each part.
	refTable, refBlocks, l1, l2, data int64
}

// newLayout plans an image with room for l2 tables and data clusters.
func newLayout(g format.Geometry, version int, size, l2, data int64) (layout, error) {
	l := layout{g: g, version: version, size: size, l1Size: max(g.L1Entries(size), 1), l2: l2, data: data}
	if l.l1Size > format.MaxL1Bytes/8 {
		return l, fmt.Errorf("%w: a disk of %d bytes with clusters of %d needs more than %d MiB of L1 table; use larger clusters",
			ErrLimit, size, g.ClusterSize, format.MaxL1Bytes>>20)
	}
	l.l1 = g.Clusters(l.l1Size * 8)
	for l.refBlocks < g.Blocks(l.clusters()) || g.Bytes(l.refTable) < l.refBlocks*8 {
		l.refBlocks = g.Blocks(l.clusters())
		l.refTable = g.Clusters(l.refBlocks * 8)
	}
	if g.Bytes(l.refTable) > format.MaxRefcountTableBytes {
		return l, fmt.Errorf("%w: the refcount table would exceed %d MiB; use larger clusters", ErrLimit, format.MaxRefcountTableBytes>>20)
	}
	return l, nil
}

// Where the parts begin, and the image ends.

func (l layout) refTableAt() format.HostOffset { return l.g.Offset(1) } // behind the header

func (l layout) refBlocksAt() format.HostOffset { return l.refTableAt().Plus(l.g.Bytes(l.refTable)) }

func (l layout) l1At() format.HostOffset   { return l.refBlocksAt().Plus(l.g.Bytes(l.refBlocks)) }
func (l layout) l2At() format.HostOffset   { return l.l1At().Plus(l.g.Bytes(l.l1)) }
func (l layout) dataAt() format.HostOffset { return l.l2At().Plus(l.g.Bytes(l.l2)) }
func (l layout) end() format.HostOffset    { return l.dataAt().Plus(l.g.Bytes(l.data)) }

// clusters is the length of the image.
func (l layout) clusters() int64 { return 1 + l.refTable + l.refBlocks + l.l1 + l.l2 + l.data }

// writeRefcounts sets the length of f, an empty file, and writes the refcount table and its blocks.
func (l layout) writeRefcounts(f File) error {
	if err := f.Truncate(int64(l.end())); err != nil {
		return err
	}
	table := make([]byte, l.g.Bytes(l.refTable))
	for i := range l.refBlocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64(l.refBlocksAt().Plus(l.g.Bytes(i))))
	}
	w := newMetadataWriter(f, l.refTableAt())
	_, _ = w.Write(table) // Flush tells
	for left := l.clusters(); left > 0; left -= l.g.BlockCounts {
		block := l.g.NewCounts(1)
		for i := range min(left, l.g.BlockCounts) {
			block.Set(i, 1)
		}
		_, _ = w.Write(block.B)
	}
	return w.Flush()
}

// writeHeader writes what makes the file an image, all else being there. It syncs before and after.
func (l layout) writeHeader(f File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	h := format.Header{
		Version: l.version, ClusterBits: l.g.ClusterBits, Size: l.size,
		L1Size: l.l1Size, L1Offset: l.l1At(), RefTableOffset: l.refTableAt(), RefTableClusters: l.refTable,
	}
	be := binary.BigEndian
	be.PutUint32(h.Sector[0:], format.Magic)
	be.PutUint32(h.Sector[4:], uint32(h.Version))
	be.PutUint32(h.Sector[20:], uint32(h.ClusterBits))
	if h.Version >= 3 {
		if l.g.Extended {
			h.Incompatible = format.IncompatExtendedL2
		}
		be.PutUint32(h.Sector[96:], uint32(l.g.RefcountOrder))
		be.PutUint32(h.Sector[100:], format.HeaderLengthV3)
	}
	if _, err := f.WriteAt(h.Encode(), 0); err != nil {
		return err
	}
	return f.Sync()
}

// newMetadataWriter writes to f in sequence, in large pieces, from off on.
func newMetadataWriter(f File, off format.HostOffset) *bufio.Writer {
	return bufio.NewWriterSize(io.NewOffsetWriter(f, int64(off)), 1<<20)
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// CreateOptions of a new image.
type CreateOptions struct {
	ClusterSize int64 // bytes, a power of two from 512 to 2 MiB; 0 = DefaultClusterSize
	Version     int   // 2 or 3; 0 = 3
}

// Create writes an image of size virtual bytes that reads as zeros into f, which must be empty, and syncs
// it. It does not close f.
func Create(f File, size int64, o CreateOptions) error {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.Version == 0 {
		o.Version = 3
	}
	clusterBits := uint(bits.TrailingZeros64(uint64(o.ClusterSize)))
	switch {
	case o.ClusterSize != 1<<clusterBits || clusterBits < minClusterBits || clusterBits > maxClusterBits:
		return fmt.Errorf("%w: cluster size %d; a power of two from %d to %d", ErrUnsupported, o.ClusterSize, 1<<minClusterBits, 1<<maxClusterBits)
	case o.Version != 2 && o.Version != 3:
		return fmt.Errorf("%w: version %d; 2 or 3", ErrUnsupported, o.Version)
	case size < 0:
		return fmt.Errorf("%w: size %d", ErrOutOfRange, size)
	}
	if n, err := f.Size(); err != nil || n != 0 {
		return fmt.Errorf("create %s: the file is not empty (%d bytes): %w", f.Name(), n, errOr(err, ErrExists))
	}
	g := newGeometry(clusterBits)
	if g.l1Entries(size) > maxL1Bytes/8 {
		return fmt.Errorf("%w: a disk of %d bytes with clusters of %d needs more than %d MiB of L1 table; use larger clusters",
			ErrLimit, size, o.ClusterSize, maxL1Bytes>>20)
	}
	b, err := emptyImage(g, size, o.Version)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	return f.Sync()
}

// emptyImage lays out header, refcount table, refcount blocks and L1 table, in that order.
func emptyImage(g geometry, size int64, version int) ([]byte, error) {
	l1Size := max(g.l1Entries(size), 1)
	l1Clusters := g.clusters(l1Size * 8)
	blocks, tableClusters := int64(1), int64(1)
	total := func() int64 { return 1 + tableClusters + blocks + l1Clusters }
	for blocks<<g.blockBits < total() || tableClusters<<g.clusterBits < blocks*8 {
		blocks = g.clusters(total() * 2)
		tableClusters = g.clusters(blocks * 8)
	}
	if tableClusters<<g.clusterBits > maxRefcountTableBytes {
		return nil, fmt.Errorf("%w: the refcount table would exceed %d MiB", ErrLimit, maxRefcountTableBytes>>20)
	}

	b := make([]byte, total()<<g.clusterBits)
	table, block := b[g.clusterSize:], b[(1+tableClusters)<<g.clusterBits:]
	for i := range blocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64((1+tableClusters+i)<<g.clusterBits))
	}
	for c := range total() {
		counts(block).set(c, 1)
	}

	h := header{
		version: version, clusterBits: g.clusterBits, size: size,
		l1Size: l1Size, l1Offset: (1 + tableClusters + blocks) << g.clusterBits,
		refTableOffset: g.clusterSize, refTableClusters: tableClusters,
	}
	be := binary.BigEndian
	be.PutUint32(h.sector[0:], magic)
	be.PutUint32(h.sector[4:], uint32(version))
	be.PutUint32(h.sector[20:], uint32(g.clusterBits))
	if version >= 3 {
		be.PutUint32(h.sector[96:], 4) // refcount_order: 16 bits
		be.PutUint32(h.sector[100:], headerLengthV3)
	}
	copy(b, h.encode())
	return b, nil
}

// errOr returns err, or other if there is none.
func errOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// DefaultClusterSize is the cluster size of images that name none, in bytes.
const DefaultClusterSize = 64 << 10

// CreateOptions of a new image.
type CreateOptions struct {
	ClusterSize int64 // bytes, a power of two from 512 to 2 MiB; 0 = DefaultClusterSize
	Version     int   // 2 or 3; 0 = 3
	// RefcountBits is the width of a reference count: a power of two from 1 to 64, 16 in version 2; 0 = 16. A
	// narrow one limits how many snapshots can share a cluster.
	RefcountBits int
	// ExtendedL2: clusters of 32 subclusters, so that a small write allocates but little of a large cluster. In
	// version 3 with clusters of 16 KiB or more.
	ExtendedL2    bool
	Preallocation Preallocation
}

// geometry fills in what is not given and checks the rest.
func (o *CreateOptions) geometry() (format.Geometry, error) {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.Version == 0 {
		o.Version = 3
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 16
	}
	clusterBits := uint(bits.TrailingZeros64(uint64(o.ClusterSize)))
	switch {
	case o.ClusterSize != 1<<clusterBits || clusterBits < format.MinClusterBits || clusterBits > format.MaxClusterBits:
		return format.Geometry{}, fmt.Errorf("%w: cluster size %d; a power of two from %d to %d", ErrUnsupported, o.ClusterSize, 1<<format.MinClusterBits, 1<<format.MaxClusterBits)
	case o.Version != 2 && o.Version != 3:
		return format.Geometry{}, fmt.Errorf("%w: version %d; 2 or 3", ErrUnsupported, o.Version)
	case bits.OnesCount(uint(o.RefcountBits)) != 1 || o.RefcountBits > 64 || o.Version < 3 && o.RefcountBits != 16:
		return format.Geometry{}, fmt.Errorf("%w: refcounts of %d bits in version %d; a power of two from 1 to 64, 16 in version 2", ErrUnsupported, o.RefcountBits, o.Version)
	case o.ExtendedL2 && (o.Version < 3 || clusterBits < format.MinExtendedClusterBits):
		return format.Geometry{}, fmt.Errorf("%w: extended L2 entries with clusters of %d bytes in version %d; they need 16 KiB and version 3", ErrUnsupported, o.ClusterSize, o.Version)
	}
	return format.NewGeometry(clusterBits, uint(bits.TrailingZeros(uint(o.RefcountBits))), o.ExtendedL2), nil
}

// MaxSize returns the largest disk, in bytes, that an image with clusters of a legal size can have, without extended L2 entries.
func MaxSize(clusterSize int64) int64 {
	g := format.NewGeometry(uint(bits.TrailingZeros64(uint64(clusterSize))), 4, false)
	return format.MaxL1Bytes / 8 * g.L2Coverage
}

// Create writes an image of size virtual bytes, rounded up to sectors, that reads as zeros into f, which must be empty, and syncs
// it. It does not close f, which is empty again when it fails or is cancelled: preallocation may take long.
func Create(ctx context.Context, f File, size int64, o CreateOptions) error {
	g, err := o.geometry()
	if err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%w: size %d", ErrOutOfRange, size)
	}
	if err := requireEmpty(f); err != nil {
		return err
	}
	size = format.RoundToSectors(size)
	if err := create(ctx, f, g, size, o); err != nil {
		// Nothing half-made is left, and no space taken.
		return errors.Join(fmt.Errorf("create %s: %w", f.Name(), err), f.Truncate(0))
	}
	host.Vouch(f)
	return nil
}

func create(ctx context.Context, f File, g format.Geometry, size int64, o CreateOptions) error {
	var l2, data int64
	if o.Preallocation != PreallocationOff {
		l2, data = g.L1Entries(size), g.Clusters(size)
	}
	l, err := newLayout(g, o.Version, size, l2, data)
	if err != nil {
		return err
	}
	if err := l.writeRefcounts(f); err != nil {
		return err
	}
	if l2 > 0 {
		if err := l.preallocate(ctx, f, o.Preallocation); err != nil {
			return err
		}
		if err := l.writeMapping(f); err != nil {
			return err
		}
	}
	return l.writeHeader(f)
}

// requireEmpty refuses to write over anything.
func requireEmpty(f File) error {
	n, err := f.Size()
	if err == nil && n != 0 {
		err = fmt.Errorf("%s holds %d bytes: %w", f.Name(), n, ErrExists)
	}
	return err
}

package driver

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-qcow2/csi-qcow2/pkg/human"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	// DefaultReserve is what is kept free of the pool's file system, in bytes.
	DefaultReserve = 1 << 30
	// DefaultOvercommit promises no more than there is: a pod whose pool is full gets I/O errors.
	DefaultOvercommit = 1.0

	// DefaultSnapshotLimit is how much a volume's snapshots may keep, in percent of its size.
	DefaultSnapshotLimit = 200
	// snapshotSlack is what a volume has beside that for metadata, in clusters.
	snapshotSlack = 256

	defaultVolumeSize = 1 << 30
	// sizeUnit is the largest logical block of a disk: sizes are its multiples.
	sizeUnit      = 4096
	minVolumeSize = 1 << 20
	minXFSSize    = 300 << 20 // mkfs.xfs refuses less
	minExt3Size   = 2 << 20   // mkfs.ext3 makes an ext2 of less, without a journal
	maxVolumeSize = 64 << 40
)

// sizeRange is what a volume's size may be, in bytes.
type sizeRange struct {
	required, limit int64 // 0: not given
}

func newSizeRange(r *csi.CapacityRange) (sizeRange, error) {
	s := sizeRange{required: r.GetRequiredBytes(), limit: r.GetLimitBytes()}
	switch {
	case s.required < 0 || s.limit < 0:
		return s, invalid("capacity range %d to %d is negative", s.required, s.limit)
	case s.limit > 0 && s.required > s.limit:
		return s, invalid("capacity range: %d bytes are required, the limit is %d", s.required, s.limit)
	}
	return s, nil
}

func (s sizeRange) contains(size int64) bool {
	return size >= s.required && (s.limit == 0 || size <= s.limit)
}

// choose returns the smallest size that holds what is required, at least least, at most most, in whole
// units; without a requirement preferred, or what the limit allows of it. errOutOfRange if there is none.
func (s sizeRange) choose(preferred, least, most int64) (int64, error) {
	size := s.required
	if size == 0 {
		size = preferred
		if s.limit > 0 {
			size = min(size, s.limit&^(sizeUnit-1))
		}
	}
	size = max(size, least)
	if size > most {
		return 0, refuse(errOutOfRange, "%s are asked for, a volume can have at most %s", human.ExactSize(size), human.ExactSize(most))
	}
	size = roundUp(size)
	if !s.contains(size) {
		return 0, refuse(errOutOfRange, "the volume may have at most %s, the smallest possible size is %s", human.ExactSize(s.limit), human.ExactSize(size))
	}
	return size, nil
}

// minFSSize is the least volume, in bytes, on which a file system can be made.
func minFSSize(fsType string) int64 {
	switch fsType {
	case fsXFS:
		return minXFSSize
	case fsExt3:
		return minExt3Size
	}
	return minVolumeSize
}

func roundUp(size int64) int64 { return (size + sizeUnit - 1) &^ (sizeUnit - 1) }

// maxSize is the largest disk that an image with this cluster size can hold, in bytes.
func maxSize(clusterSize int64) int64 {
	return min(maxVolumeSize, qcow2.MaxSize(clusterSize))
}

// capacity decides what still fits in the pool.
type capacity struct {
	node       string // whose pool it is, for people
	reserve    int64
	overcommit float64

	mu        sync.Mutex          // guards what follows
	pending   map[string]int64    // sizes that volumes are about to have, by ID
	snapshots map[string]struct{} // volumes of which a snapshot is being taken, by ID
}

// available returns how many bytes can be promised to new volumes.
func (c *capacity) available(p *pool.Pool) (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	left, _, err := c.left(p)
	return max(left, 0) &^ (sizeUnit - 1), err
}

// left is Left for the pool. mu is held.
func (c *capacity) left(p *pool.Pool) (left int64, space pool.Space, err error) {
	space, err = p.Space(c.pending, slices.Collect(maps.Keys(c.snapshots))...)
	if err != nil {
		return 0, space, fmt.Errorf("space of the pool: %w", err)
	}
	return Left(space, c.reserve, c.overcommit), space, nil
}

// Left returns how many bytes can be promised to new volumes: (free − reserve) × the overcommit ratio − what is promised and not
// yet written; negative if too much is.
func Left(space pool.Space, reserve int64, overcommit float64) int64 {
	usable := float64(max(space.Free-reserve, 0)) * overcommit
	return int64(min(usable, math.MaxInt64/2)) - space.Promised
}

// full is errExhausted, with what there is instead of what was asked for, and what to do.
func (c *capacity) full(s pool.Space, format string, args ...any) error {
	return refuse(errExhausted, "%s. Of the pool's file system %s are free, of which %s are reserved; %s are promised to %d volumes; "+
		"overcommit is %v. Delete snapshots or volumes on that node, make its pool larger, or change reserve and overcommit (ConfigMap "+
		"csi-qcow2, flags of csi-qcow2 node)", fmt.Sprintf(format, args...),
		human.Size(s.Free), human.Size(c.reserve), human.Size(s.Promised), s.PromisedTo, c.overcommit)
}

// promise takes what a volume needs to grow from one size to another, a new one from 0, out of what is available.
// done says that it has that size, as the pool sees for itself, or will not get it.
// errExhausted if the growth does not fit.
func (c *capacity) promise(p *pool.Pool, id string, from, to int64) (done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	left, space, err := c.left(p)
	if err != nil {
		return nil, err
	}
	if left = max(left, 0) &^ (sizeUnit - 1); to-from > left {
		return nil, c.full(space, "%s do not fit in the pool of node %s, which can promise %s more", human.Size(to-from), c.node, human.Size(left))
	}
	c.pending[id] = to
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.pending, id)
	}, nil
}

// promiseSnapshot takes what a volume may overwrite after a snapshot, which keeps it, out of what is available. done says that
// the pool sees the snapshot for itself, or that there will be none.
// errExhausted if the pool cannot promise as much, or the volume's snapshots would keep more than limit percent of its size.
func (c *capacity) promiseSnapshot(p *pool.Pool, id string, params volumeParameters, limit int64) (done func(), err error) {
	allocated, size, err := p.Usage(id)
	if err != nil {
		return nil, err
	}
	if most := float64(size)/100*float64(limit) + float64(snapshotSlack*params.clusterSizeOrDefault()); float64(allocated) > most {
		return nil, refuse(errExhausted, "the volume occupies %s, which its snapshots would keep; they may keep %s (%s %d%% of its size): "+
			"delete snapshots of it", human.Size(allocated), human.Size(int64(most)), paramSnapshotLimit, limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.snapshots[id] = struct{}{}
	left, space, err := c.left(p)
	if err == nil && left < 0 {
		err = c.full(space, "a snapshot keeps what its volume overwrites, up to all of its %s, and the pool of node %s lacks %s for that",
			human.Size(size), c.node, human.Size(-left))
	}
	if err != nil {
		delete(c.snapshots, id)
		return nil, err
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.snapshots, id)
	}, nil
}

// GetCapacity says what a CreateVolume now would be granted.
func (c *controller) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	params, err := parseVolumeParameters(req.GetParameters())
	if err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	left := int64(0)
	unusable := len(req.GetVolumeCapabilities()) > 0 && checkCapabilities(req.GetVolumeCapabilities()) != nil
	if !unusable && c.accessible(req.GetAccessibleTopology()) {
		if left, err = c.capacity.available(p); err != nil {
			return nil, err
		}
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: left,
		// The scheduler looks at this instead of the capacity where it is set.
		MaximumVolumeSize: wrapperspb.Int64(min(left, maxSize(params.clusterSizeOrDefault()))),
		MinimumVolumeSize: wrapperspb.Int64(minVolumeSize),
	}, nil
}

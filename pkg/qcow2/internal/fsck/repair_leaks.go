package fsck

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// leaksFlags tells whether, with a leak given back, a COPIED flag would have to be set: the two cannot be changed in one
// write, so that takes a rebuild.
func (c *checker) leaksFlags() bool {
	for k := range c.inOrder() {
		for i := range int64(groupClusters) {
			if k.refs.get(i) == 1 && k.stored.get(i) > 1 && k.use(i) >= useL2 {
				return true
			}
		}
	}
	return false
}

// lowerCounts lowers the count of each leaked cluster, in place: every sector that reaches the disk makes the image a
// little better. Then the clusters that are free now are given back to the file system.
func (r *repairer) lowerCounts(c *checker) error {
	var free format.Runs
	err := c.scan(c.h.RefTableOffset, c.g.Bytes(c.h.RefTableClusters), func(b []byte, at int64) error {
		for i := 0; i < len(b); i += 8 {
			e := binary.BigEndian.Uint64(b[i:])
			off := format.HostOffset(e &^ format.RefTableReserved)
			if e == 0 || e >= format.MaxHostOffset || !c.g.Aligned(off) || off >= c.length {
				continue
			}
			k, j := c.group(c.g.Cluster(off))
			if k.use(j) != useRefcountBlock || k.refs.get(j) != 1 {
				continue // something else may own it
			}
			if err := r.lowerBlock(c, off, (at+int64(i))/8, &free); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = r.f.Sync()
	}
	if err != nil || r.result.Found.Corruptions+r.result.Found.Errors > 0 {
		return err // what a damaged image has lost may be found in its leaks
	}
	for _, run := range free {
		at := c.g.Offset(run.First)
		if n := min(c.g.Bytes(run.N), int64(c.length-at)); n > 0 {
			if err := r.f.PunchHole(int64(at), n); err != nil {
				return err
			}
		}
	}
	return nil
}

// lowerBlock is lowerCounts for the refcount block with that index, at off.
func (r *repairer) lowerBlock(c *checker, off format.HostOffset, index int64, free *format.Runs) error {
	block := c.g.NewCounts(1)
	if err := format.ReadPadded(r.f, block.B, off); err != nil {
		return err
	}
	var dirty format.SectorSet
	for i := range min(c.g.BlockCounts, max(0, int64(c.end-c.g.Counted(index, 0)))) {
		cluster := c.g.Counted(index, i)
		k, j := c.group(cluster)
		stored, refs := k.stored.get(j), k.refs.get(j)
		if stored <= refs || block.Get(i) != stored || refs == 1 && k.use(j) >= useL2 {
			continue
		}
		block.Set(i, refs)
		dirty.Add(block.At(i) / format.SectorSize)
		r.note("cluster %d at %#x: refcount %d became %d", cluster, c.g.Offset(cluster), stored, refs)
		if refs == 0 {
			free.Add(cluster.Alone())
		}
	}
	var err error
	dirty.Each(func(first, n int64) {
		at := first * format.SectorSize
		if _, e := r.f.WriteAt(block.B[at:at+n*format.SectorSize], int64(off)+at); e != nil && err == nil {
			err = fmt.Errorf("write refcount block %d: %w", index, e)
		}
	})
	return err
}

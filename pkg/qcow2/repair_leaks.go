package qcow2

import (
	"encoding/binary"
	"fmt"
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
	var free runs
	err := c.scan(c.h.refTableOffset, c.h.refTableClusters<<c.g.clusterBits, func(b []byte, at int64) error {
		for i := 0; i < len(b); i += 8 {
			e := binary.BigEndian.Uint64(b[i:])
			off := int64(e &^ refTableReserved)
			if e == 0 || e >= maxHostOffset || !c.g.aligned(off) || off >= c.length {
				continue
			}
			k, j := c.group(off >> c.g.clusterBits)
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
		at := run.first << c.g.clusterBits
		if n := min(run.n<<c.g.clusterBits, c.length-at); n > 0 {
			if err := r.f.PunchHole(at, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// lowerBlock is lowerCounts for the refcount block with that index, at off.
func (r *repairer) lowerBlock(c *checker, off, index int64, free *runs) error {
	block := c.g.newCounts(1)
	if err := readPadded(r.f, block.b, off); err != nil {
		return err
	}
	var dirty sectorSet
	for i := range min(c.g.blockCounts, max(0, c.clusters-index<<c.g.blockBits)) {
		cluster := index<<c.g.blockBits + i
		k, j := c.group(cluster)
		stored, refs := k.stored.get(j), k.refs.get(j)
		if stored <= refs || block.get(i) != stored || refs == 1 && k.use(j) >= useL2 {
			continue
		}
		block.set(i, refs)
		dirty.add(block.at(i) / sectorSize)
		r.note("cluster %d at %#x: refcount %d became %d", cluster, cluster<<c.g.clusterBits, stored, refs)
		if refs == 0 {
			free.add(run{cluster, 1})
		}
	}
	var err error
	dirty.each(func(first, n int64) {
		at := first * sectorSize
		if _, e := r.f.WriteAt(block.b[at:at+n*sectorSize], off+at); e != nil && err == nil {
			err = fmt.Errorf("write refcount block %d: %w", index, e)
		}
	})
	return err
}

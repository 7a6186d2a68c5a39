package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
)

// clusterUse is what a host cluster holds.
type clusterUse uint8

const (
	useNothing clusterUse = iota
	useHeader
	useRefcountTable
	useRefcountBlock
	useSnapshotTable
	useBitmapDirectory
	useBitmapTable
	useBitmapData
	useL1
	useSnapshotL1
	useL2         // several L1 tables may share it
	useData       // several L2 tables may share it
	useCompressed // several L2 entries may share it
)

func (u clusterUse) String() string {
	return [...]string{
		"nothing", "the header", "the refcount table", "a refcount block", "the snapshot table", "the bitmap directory",
		"a bitmap table", "bitmap data", "the active L1 table", "a snapshot's L1 table", "an L2 table", "data", "compressed data",
	}[u]
}

// mayShare tells whether a cluster may be referenced for both uses.
func (u clusterUse) mayShare(with clusterUse) bool {
	return u == useL2 && with == useL2 || u >= useData && with >= useData
}

// origin is where a reference comes from: entry index of the table at offset table, or for useSnapshotL1 the
// snapshot table's row.
type origin struct {
	use          clusterUse
	table, index int64
}

func (o origin) String() string {
	switch o.use {
	case useRefcountBlock, useBitmapData, useL2, useData, useCompressed:
		return fmt.Sprintf("%s (entry %d of the table at %#x)", o.use, o.index, o.table)
	case useSnapshotL1, useBitmapTable:
		return fmt.Sprintf("%s (number %d)", o.use, o.index)
	}
	return o.use.String()
}

// clusterGroup is what is known about groupClusters consecutive host clusters. Groups in which nothing is counted
// or referenced do not exist.
type clusterGroup struct {
	number int64
	stored [groupClusters]uint16 // counts in the refcount blocks
	refs   [groupClusters]uint16 // references found
	use    [groupClusters]clusterUse
}

const groupClusters = 4096

// group returns the group that cluster lies in, and its index there.
func (c *checker) group(cluster int64) (*clusterGroup, int64) {
	number, i := cluster/groupClusters, cluster%groupClusters
	if c.recent == nil || c.recent.number != number {
		c.recent = c.groups[number]
		if c.recent == nil {
			c.recent = &clusterGroup{number: number}
			c.groups[number] = c.recent
		}
	}
	return c.recent, i
}

// stored returns the count that the image has for the cluster at off.
func (c *checker) stored(off int64) uint16 {
	if cluster := off >> c.g.clusterBits; cluster < c.clusters {
		k, i := c.group(cluster)
		return k.stored[i]
	}
	return 0
}

// reference counts that times paths lead to the clusters of the n bytes at off. It returns false, and reports
// it, if they lie behind the end of the file by a cluster or more (the last cluster may be a part only), or in
// clusters that are in use for something that cannot share them.
func (c *checker) reference(from origin, off, n, times int64) bool {
	if off+n-c.length >= c.g.clusterSize {
		c.corrupt(times, "%s: offset %#x, %#x bytes, is behind the end of the file", from, off, n)
		return false
	}
	ok := true
	end := (off + n + c.g.clusterSize - 1) >> c.g.clusterBits
	for cluster := off >> c.g.clusterBits; cluster < end; {
		k, first := c.group(cluster)
		last := min(first+end-cluster, groupClusters)
		for i := first; i < last; i++ {
			if sum := int64(k.refs[i]) + times; sum <= math.MaxUint16 {
				k.refs[i] = uint16(sum)
			} else {
				k.refs[i] = math.MaxUint16 // as storeCounts cuts what is stored
				if c.g.refcountOrder <= 4 {
					c.corrupt(1, "%s: the cluster at %#x has more references than a refcount can hold", from, (cluster+i-first)<<c.g.clusterBits)
				}
			}
			switch {
			case k.use[i] == useNothing:
				k.use[i] = from.use
			case !k.use[i].mayShare(from.use):
				c.corrupt(1, "overlap: the cluster at %#x is %s and %s", (cluster+i-first)<<c.g.clusterBits, k.use[i], from)
				ok = false
			}
		}
		cluster += last - first
	}
	c.clusters = max(c.clusters, end)
	return ok
}

// loadRefcounts reads the refcount table and all blocks.
func (c *checker) loadRefcounts() error {
	size := c.h.refTableClusters << c.g.clusterBits
	if !c.reference(origin{use: useRefcountTable}, c.h.refTableOffset, size, 1) {
		return nil
	}
	return c.scan(c.h.refTableOffset, size, func(b []byte, at int64) error {
		for i := 0; i < len(b); i += 8 {
			if entry := binary.BigEndian.Uint64(b[i:]); entry != 0 {
				if err := c.loadRefcountBlock((at+int64(i))/8, entry); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// loadRefcountBlock reads the block that the table's entry number index points at.
func (c *checker) loadRefcountBlock(index int64, entry uint64) error {
	from := origin{use: useRefcountBlock, table: c.h.refTableOffset, index: index}
	off := int64(entry &^ refTableReserved)
	switch {
	case entry >= maxHostOffset || off>>c.g.clusterBits >= c.clusters:
		c.corrupt(1, "%s: offset %#x is behind the end of the file", from, uint64(off))
		return nil
	case !c.g.aligned(off):
		c.corrupt(1, "%s: offset %#x is not aligned to a cluster", from, off)
		return nil
	case entry&refTableReserved != 0:
		c.corrupt(1, "%s: reserved bits are set in %#x", from, entry)
	case !c.reference(from, off, c.g.clusterSize, 1):
		return nil // what it holds cannot be counts
	}
	first := index << c.g.blockBits
	return c.scan(off, c.g.clusterSize, func(b []byte, at int64) error {
		part := counts{b, c.g.refcountOrder}
		c.storeCounts(first+at<<3>>c.g.refcountOrder, part)
		return nil
	})
}

// storeCounts notes the counts in b for the clusters from first on, as far as they can be in use. More than 16 bits
// are cut to the largest number of 16, beyond which wrong counts are not found.
func (c *checker) storeCounts(first int64, b counts) {
	perWord := int64(64) >> c.g.refcountOrder
	n := min(b.len(), c.clusters+1-first)
	for i := int64(0); i < n; i++ {
		if i%perWord == 0 && i+perWord <= n && binary.NativeEndian.Uint64(b.b[b.at(i):]) == 0 {
			i += perWord - 1
			continue
		}
		if count := b.get(i); count != 0 {
			k, at := c.group(first + i)
			k.stored[at] = uint16(min(count, math.MaxUint16))
		}
	}
}

// compareRefcounts judges each cluster's stored count by the references found.
func (c *checker) compareRefcounts() {
	for _, number := range slices.Sorted(maps.Keys(c.groups)) {
		k := c.groups[number]
		first := number * groupClusters
		for i := range min(groupClusters, max(0, c.clusters-first)) {
			stored, refs := k.stored[i], k.refs[i]
			if stored|refs != 0 {
				c.result.ImageEnd = (first + i + 1) << c.g.clusterBits
			}
			switch {
			case stored < refs:
				c.corrupt(1, "cluster %d at %#x (%s): refcount %d, references %d", first+i, (first+i)<<c.g.clusterBits, k.use[i], stored, refs)
			case stored > refs:
				c.leak("leak: cluster %d at %#x (%s): refcount %d, references %d", first+i, (first+i)<<c.g.clusterBits, k.use[i], stored, refs)
			}
		}
	}
}

package fsck

import (
	"encoding/binary"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// stored returns the count that the image has for the cluster at off.
func (c *checker) stored(off format.HostOffset) uint64 {
	if cluster := c.g.Cluster(off); cluster < c.end {
		k, i := c.group(cluster)
		return k.stored.get(i)
	}
	return 0
}

// reference counts that times paths lead to the clusters of the n bytes at off. It returns false, and reports
// it, if they lie behind the end of the file by a cluster or more (the last cluster may be a part only), or in
// clusters that are in use for something that cannot share them.
func (c *checker) reference(from origin, off format.HostOffset, n, times int64) bool {
	if off >= format.MaxHostOffset || int64(off.Plus(n)-c.length) >= c.g.ClusterSize {
		c.corrupt(times, "%s: offset %#x, %#x bytes, is behind the end of the file", from, off, n)
		return false
	}
	ok := true
	all := c.g.RunOf(off, n)
	for left := all; left.N > 0; {
		k, first := c.group(left.First)
		last := min(first+left.N, groupClusters)
		k.refs.runs(first, last-first, func(i, n int64, v uint64) { k.refs.fill(i, n, v+uint64(times)) })
		k.uses.runs(first, last-first, func(i, n int64, v uint64) {
			switch use := clusterUse(v); {
			case use == useNothing:
				k.uses.fill(i, n, uint64(from.use))
			case !use.mayShare(from.use):
				for j := i; j < i+n; j++ {
					c.corrupt(1, "overlap: the cluster at %#x is %s and %s", c.g.Offset(k.at(j)), use, from)
				}
				ok = false
			}
		})
		left = left.Behind(last - first)
	}
	c.end = max(c.end, all.End())
	return ok
}

// loadRefcounts reads the refcount table and all blocks.
func (c *checker) loadRefcounts() error {
	size := c.g.Bytes(c.h.RefTableClusters)
	if size == 0 {
		c.corrupt(1, "the image has no refcount table")
		return nil
	}
	if !c.reference(origin{use: useRefcountTable}, c.h.RefTableOffset, size, 1) {
		return nil
	}
	return c.scan(c.h.RefTableOffset, size, func(b []byte, at int64) error {
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
	from := origin{use: useRefcountBlock, table: c.h.RefTableOffset, index: index}
	off := format.HostOffset(entry &^ format.RefTableReserved)
	if off < 0 || !c.g.Aligned(off) {
		// Like QEMU, which cannot read the counts.
		c.result.Errors += max(0, min(c.g.BlockCounts, int64(c.end-c.g.Counted(index, 0))))
	}
	switch {
	case entry >= format.MaxHostOffset || c.g.Cluster(off) >= c.end:
		c.corrupt(1, "%s: offset %#x is behind the end of the file", from, uint64(off))
		return nil
	case !c.g.Aligned(off):
		c.corrupt(1, "%s: offset %#x is not aligned to a cluster", from, off)
		return nil
	case entry&format.RefTableReserved != 0:
		c.corrupt(1, "%s: reserved bits are set in %#x", from, entry)
	case !c.reference(from, off, c.g.ClusterSize, 1):
		return nil // what it holds cannot be counts
	}
	return c.scan(off, c.g.ClusterSize, func(b []byte, at int64) error {
		part := format.Counts{B: b, Order: c.g.RefcountOrder}
		c.storeCounts(c.g.Counted(index, at<<3>>c.g.RefcountOrder), part)
		return nil
	})
}

// storeCounts notes the counts in b for the clusters from first on, as far as they can be in use.
func (c *checker) storeCounts(first format.Cluster, b format.Counts) {
	n := min(b.Len(), int64(c.end+1-first))
	for i := int64(0); i < n; {
		v := b.Get(i)
		end := b.Alike(i, n-i, v)
		for v != 0 && i < end {
			k, at := c.group(first + format.Cluster(i))
			m := min(end-i, groupClusters-at)
			k.stored.fill(at, m, v)
			i += m
		}
		i = end
	}
}

// compareRefcounts judges each cluster's stored count by the references found.
func (c *checker) compareRefcounts() {
	for k := range c.inOrder() {
		n := min(groupClusters, max(0, int64(c.end-k.at(0))))
		if last, yes := k.agree(n); yes {
			if last >= 0 {
				c.result.ImageEnd = int64(c.g.Offset(k.at(last + 1)))
			}
			continue
		}
		for i := range n {
			stored, refs, cluster := k.stored.get(i), k.refs.get(i), k.at(i)
			if stored|refs != 0 {
				c.result.ImageEnd = int64(c.g.Offset(cluster + 1))
			}
			switch {
			case stored < refs:
				c.corrupt(1, "cluster %d at %#x (%s): refcount %d, references %d", cluster, c.g.Offset(cluster), k.use(i), stored, refs)
			case stored > refs:
				c.leak("leak: cluster %d at %#x (%s): refcount %d, references %d", cluster, c.g.Offset(cluster), k.use(i), stored, refs)
			}
		}
	}
}

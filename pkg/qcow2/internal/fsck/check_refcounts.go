package fsck

import (
	"encoding/binary"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// stored returns the count that the image has for the cluster at off.
func (c *checker) stored(off int64) uint64 {
	if cluster := off >> c.g.ClusterBits; cluster < c.clusters {
		k, i := c.group(cluster)
		return k.stored.get(i)
	}
	return 0
}

// reference counts that times paths lead to the clusters of the n bytes at off. It returns false, and reports
// it, if they lie behind the end of the file by a cluster or more (the last cluster may be a part only), or in
// clusters that are in use for something that cannot share them.
func (c *checker) reference(from origin, off, n, times int64) bool {
	if off >= format.MaxHostOffset || off+n-c.length >= c.g.ClusterSize {
		c.corrupt(times, "%s: offset %#x, %#x bytes, is behind the end of the file", from, off, n)
		return false
	}
	ok := true
	end := (off + n + c.g.ClusterSize - 1) >> c.g.ClusterBits
	for cluster := off >> c.g.ClusterBits; cluster < end; {
		k, first := c.group(cluster)
		last := min(first+end-cluster, groupClusters)
		k.refs.runs(first, last-first, func(i, n int64, v uint64) { k.refs.fill(i, n, v+uint64(times)) })
		k.uses.runs(first, last-first, func(i, n int64, v uint64) {
			switch use := clusterUse(v); {
			case use == useNothing:
				k.uses.fill(i, n, uint64(from.use))
			case !use.mayShare(from.use):
				for j := i; j < i+n; j++ {
					c.corrupt(1, "overlap: the cluster at %#x is %s and %s", (cluster+j-first)<<c.g.ClusterBits, use, from)
				}
				ok = false
			}
		})
		cluster += last - first
	}
	c.clusters = max(c.clusters, end)
	return ok
}

// loadRefcounts reads the refcount table and all blocks.
func (c *checker) loadRefcounts() error {
	size := c.h.RefTableClusters << c.g.ClusterBits
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
	off := int64(entry &^ format.RefTableReserved)
	if off < 0 || !c.g.Aligned(off) {
		// Like QEMU, which cannot read the counts.
		c.result.Errors += max(0, min(c.g.BlockCounts, c.clusters-index<<c.g.BlockBits))
	}
	switch {
	case entry >= format.MaxHostOffset || off>>c.g.ClusterBits >= c.clusters:
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
	first := index << c.g.BlockBits
	return c.scan(off, c.g.ClusterSize, func(b []byte, at int64) error {
		part := format.Counts{B: b, Order: c.g.RefcountOrder}
		c.storeCounts(first+at<<3>>c.g.RefcountOrder, part)
		return nil
	})
}

// storeCounts notes the counts in b for the clusters from first on, as far as they can be in use.
func (c *checker) storeCounts(first int64, b format.Counts) {
	n := min(b.Len(), c.clusters+1-first)
	for i := int64(0); i < n; {
		v := b.Get(i)
		end := b.Alike(i, n-i, v)
		for v != 0 && i < end {
			k, at := c.group(first + i)
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
		n := min(groupClusters, max(0, c.clusters-k.first()))
		if last, yes := k.agree(n); yes {
			if last >= 0 {
				c.result.ImageEnd = (k.first() + last + 1) << c.g.ClusterBits
			}
			continue
		}
		for i := range n {
			stored, refs, cluster := k.stored.get(i), k.refs.get(i), k.first()+i
			if stored|refs != 0 {
				c.result.ImageEnd = (cluster + 1) << c.g.ClusterBits
			}
			switch {
			case stored < refs:
				c.corrupt(1, "cluster %d at %#x (%s): refcount %d, references %d", cluster, cluster<<c.g.ClusterBits, k.use(i), stored, refs)
			case stored > refs:
				c.leak("leak: cluster %d at %#x (%s): refcount %d, references %d", cluster, cluster<<c.g.ClusterBits, k.use(i), stored, refs)
			}
		}
	}
}

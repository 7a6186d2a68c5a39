package qcow2

// chunk is a part of a request that lies under one L2 table.
type chunk struct {
	off, n      int64 // guest bytes
	table       int64 // index in L1
	first, last int64 // entries in the L2 table, both included
}

// maxChunk bounds what a request holds in memory at once.
const maxChunk = 4 << 20

// chunks calls fn for each part of n bytes at off, in order.
func (g geometry) chunks(off, n int64, fn func(chunk) error) error {
	return g.parts(off, n, max(maxChunk, g.clusterSize), fn)
}

// parts is chunks with parts of at most so many bytes, a multiple of the cluster size.
func (g geometry) parts(off, n, most int64, fn func(chunk) error) error {
	for n > 0 {
		k := min(n, g.l2Coverage-off%g.l2Coverage, most-g.inCluster(off))
		c := chunk{off: off, n: k, table: g.l1Index(off), first: g.l2Index(off), last: g.l2Index(off + k - 1)}
		if err := fn(c); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// guest returns the guest clusters of c, end excluded.
func (c chunk) guest(g geometry) (first, end int64) {
	return c.off >> g.clusterBits, (c.off+c.n-1)>>g.clusterBits + 1
}

// wholeClusters splits c into the parts of clusters at its ends and what lies between. The last cluster of the
// disk is whole if all of the disk in it is.
func (g geometry) wholeClusters(c chunk, size int64) []chunk {
	part := func(from, to int64) chunk {
		return chunk{off: from, n: to - from, table: c.table, first: g.l2Index(from), last: g.l2Index(to - 1)}
	}
	end := c.off + c.n
	from := (c.off + g.clusterSize - 1) &^ (g.clusterSize - 1)
	to := end &^ (g.clusterSize - 1)
	if end == size {
		to = end
	}
	if from >= to {
		return []chunk{c}
	}
	var parts []chunk
	if from > c.off {
		parts = append(parts, part(c.off, from))
	}
	parts = append(parts, part(from, to))
	if to < end {
		parts = append(parts, part(to, end))
	}
	return parts
}

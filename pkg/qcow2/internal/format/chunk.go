package format

// Chunk is a part of a request that lies under one L2 table.
type Chunk struct {
	Off, N      int64 // guest bytes
	Table       int64 // index in L1
	First, Last int64 // entries in the L2 table, both included
}

// maxChunk bounds what a request holds in memory at once.
const maxChunk = 4 << 20

// Chunks calls fn for each part of n bytes at off, in order.
func (g Geometry) Chunks(off, n int64, fn func(Chunk) error) error {
	return g.Parts(off, n, max(maxChunk, g.ClusterSize), fn)
}

// Parts is Chunks with parts of at most so many bytes, a multiple of the cluster size.
func (g Geometry) Parts(off, n, most int64, fn func(Chunk) error) error {
	for n > 0 {
		k := min(n, g.L2Coverage-off%g.L2Coverage, most-g.InCluster(off))
		c := Chunk{Off: off, N: k, Table: g.L1Index(off), First: g.L2Index(off), Last: g.L2Index(off + k - 1)}
		if err := fn(c); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// Guest returns the guest clusters of c, end excluded.
func (c Chunk) Guest(g Geometry) (first, end int64) {
	return g.GuestCluster(c.Off), g.GuestCluster(c.Off+c.N-1) + 1
}

// WholeClusters splits c into the parts of clusters at its ends and what lies between. The last cluster of the
// disk is whole if all of the disk in it is.
func (g Geometry) WholeClusters(c Chunk, size int64) []Chunk {
	part := func(from, to int64) Chunk {
		return Chunk{Off: from, N: to - from, Table: c.Table, First: g.L2Index(from), Last: g.L2Index(to - 1)}
	}
	end := c.Off + c.N
	from := (c.Off + g.ClusterSize - 1) &^ (g.ClusterSize - 1)
	to := end &^ (g.ClusterSize - 1)
	if end == size {
		to = end
	}
	if from >= to {
		return []Chunk{c}
	}
	var parts []Chunk
	if from > c.Off {
		parts = append(parts, part(c.Off, from))
	}
	parts = append(parts, part(from, to))
	if to < end {
		parts = append(parts, part(to, end))
	}
	return parts
}

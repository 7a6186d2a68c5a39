package format

// Chunk is a part of a request that lies under one L2 table.
type Chunk struct {
	Off         GuestOffset
	N           int64 // bytes
	Table       int64 // index in L1
	First, Last int64 // entries in the L2 table, both included
}

// Chunk returns the n bytes at off, which lie under one L2 table.
func (g Geometry) Chunk(off GuestOffset, n int64) Chunk {
	return Chunk{Off: off, N: n, Table: g.L1Index(off), First: g.L2Index(off), Last: g.L2Index(off.Plus(n - 1))}
}

// End is the place behind the last byte.
func (c Chunk) End() GuestOffset { return c.Off.Plus(c.N) }

// UpToTable returns how many bytes there are from off to the end of what its L2 table maps.
func (g Geometry) UpToTable(off GuestOffset) int64 { return g.L2Coverage - int64(off)%g.L2Coverage }

// maxChunk bounds what a request holds in memory at once.
const maxChunk = 4 << 20

// Chunks calls fn for each part of n bytes at off, in order.
func (g Geometry) Chunks(off GuestOffset, n int64, fn func(Chunk) error) error {
	return g.Parts(off, n, max(maxChunk, g.ClusterSize), fn)
}

// Parts is Chunks with parts of at most so many bytes, a multiple of the cluster size.
func (g Geometry) Parts(off GuestOffset, n, most int64, fn func(Chunk) error) error {
	for n > 0 {
		k := min(n, g.UpToTable(off), most-g.InCluster(off))
		if err := fn(g.Chunk(off, k)); err != nil {
			return err
		}
		off, n = off.Plus(k), n-k
	}
	return nil
}

// Guest returns the guest clusters of c, end excluded.
func (c Chunk) Guest(g Geometry) (first, end int64) {
	return g.GuestCluster(c.Off), g.GuestCluster(c.End()-1) + 1
}

// WholeClusters splits c into the parts of clusters at its ends and what lies between. The last cluster of the
// disk is whole if all of the disk in it is.
func (g Geometry) WholeClusters(c Chunk, size int64) []Chunk {
	part := func(from, to GuestOffset) Chunk { return g.Chunk(from, int64(to-from)) }
	end, mask := c.End(), GuestOffset(g.ClusterSize-1)
	from, to := (c.Off+mask)&^mask, end&^mask
	if int64(end) == size {
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

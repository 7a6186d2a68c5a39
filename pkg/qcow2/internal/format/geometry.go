package format

// Geometry is what follows from an image's cluster size, refcount width and kind of L2 entries.
type Geometry struct {
	ClusterBits   uint
	ClusterSize   int64
	Extended      bool  // L2 entries of 16 bytes, with a bitmap of 32 subclusters
	SubSize       int64 // bytes of a subcluster: the unit in which a cluster holds data; clusterSize if not extended
	L2Entries     int64 // entries in an L2 table, which fills one cluster
	L2Coverage    int64 // guest bytes under one L2 table
	RefcountOrder uint  // log2 of the bits of a refcount
	BlockBits     uint  // log2 of the counts in a refcount block
	BlockCounts   int64 // counts in a refcount block, which fills one cluster
}

// NewGeometry takes checked cluster bits (9..21, from 14 on if extended) and refcount order (0..6).
func NewGeometry(clusterBits, refcountOrder uint, extended bool) Geometry {
	g := Geometry{
		ClusterBits:   clusterBits,
		ClusterSize:   1 << clusterBits,
		Extended:      extended,
		SubSize:       1 << clusterBits,
		L2Entries:     1 << (clusterBits - 3),
		RefcountOrder: refcountOrder,
		BlockBits:     clusterBits + 3 - refcountOrder,
		BlockCounts:   1 << (clusterBits + 3 - refcountOrder),
	}
	if extended {
		g.SubSize /= Subclusters
		g.L2Entries /= 2
	}
	g.L2Coverage = g.Bytes(g.L2Entries)
	return g
}

// Clusters returns how many clusters n bytes need.
func (g Geometry) Clusters(n int64) int64 { return n>>g.ClusterBits + min(n&(g.ClusterSize-1), 1) }

// Bytes returns how many bytes n clusters are.
func (g Geometry) Bytes(n int64) int64 { return n << g.ClusterBits }

// L1Entries returns the L1 size that a disk of size bytes needs.
func (g Geometry) L1Entries(size int64) int64 {
	n := size / g.L2Coverage
	if size%g.L2Coverage != 0 {
		n++ // not size+l2Coverage-1 above: that may exceed an int64
	}
	return n
}

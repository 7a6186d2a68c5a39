package format

// Geometry is what follows from an image's cluster size, refcount width and kind of L2 entries.
type Geometry struct {
	ClusterBits   uint
	ClusterSize   int64
	Extended      bool  // L2 entries of 16 bytes, with a bitmap of 32 subclusters
	SubSize       int64 // bytes of a subcluster: the unit in which a cluster holds data; clusterSize if not extended
	L2Bits        uint  // log2 of the entries in an L2 table
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
		L2Bits:        clusterBits - 3,
		RefcountOrder: refcountOrder,
		BlockBits:     clusterBits + 3 - refcountOrder,
		BlockCounts:   1 << (clusterBits + 3 - refcountOrder),
	}
	if extended {
		g.SubSize /= Subclusters
		g.L2Bits--
	}
	g.L2Entries = 1 << g.L2Bits
	g.L2Coverage = g.L2Entries << clusterBits
	return g
}

// Clusters returns how many clusters n bytes need.
func (g Geometry) Clusters(n int64) int64 { return n>>g.ClusterBits + min(g.InCluster(n), 1) }

// Aligned tells whether off is the first byte of a cluster.
func (g Geometry) Aligned(off HostOffset) bool { return int64(off)&(g.ClusterSize-1) == 0 }

// InCluster is the part of off below the cluster size.
func (g Geometry) InCluster(off int64) int64 { return off & (g.ClusterSize - 1) }

// L1Entries returns the L1 size that a disk of size bytes needs.
func (g Geometry) L1Entries(size int64) int64 {
	n := size / g.L2Coverage
	if size%g.L2Coverage != 0 {
		n++ // not size+l2Coverage-1 above: that may exceed an int64
	}
	return n
}

// L1Index returns the index of the L1 entry that a guest offset is under.
func (g Geometry) L1Index(guest int64) int64 { return guest / g.L2Coverage }

// L2Index returns the index of the L2 entry, in its table, that maps a guest offset.
func (g Geometry) L2Index(guest int64) int64 { return guest >> g.ClusterBits & (g.L2Entries - 1) }

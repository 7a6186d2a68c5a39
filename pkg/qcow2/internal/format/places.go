package format

// HostOffset is a place in the image's file, in bytes from its start. 0 is the header, so in the entries of tables it means nowhere;
// in a sound image all are below MaxHostOffset. How many bytes something has is an int64.
type HostOffset int64

// Plus returns the place n bytes behind o.
func (o HostOffset) Plus(n int64) HostOffset { return o + HostOffset(n) }

// Cluster is the number of a host cluster: the image's file is clusters, from its start on, and 0 is the header's. The first that
// lies behind any file is MaxHostOffset >> ClusterBits. How many clusters there are of something is an int64.
type Cluster int64

// Alone returns the run of c and nothing else.
func (c Cluster) Alone() Run { return Run{c, 1} }

// Cluster returns the host cluster in which off lies.
func (g Geometry) Cluster(off HostOffset) Cluster { return Cluster(off >> g.ClusterBits) }

// ClusterBehind returns the first host cluster that begins at off or behind it.
func (g Geometry) ClusterBehind(off HostOffset) Cluster { return Cluster(g.Clusters(int64(off))) }

// Offset returns where c begins.
func (g Geometry) Offset(c Cluster) HostOffset { return HostOffset(c) << g.ClusterBits }

// RunOf returns the host clusters that n bytes at off touch.
func (g Geometry) RunOf(off HostOffset, n int64) Run {
	return RunTo(g.Cluster(off), g.ClusterBehind(off.Plus(n)))
}

// GuestCluster returns the number of the guest cluster in which an offset on the disk lies.
func (g Geometry) GuestCluster(off int64) int64 { return off >> g.ClusterBits }

// Bytes returns how many bytes n clusters are.
func (g Geometry) Bytes(n int64) int64 { return n << g.ClusterBits }

// BlockOf returns the index of the refcount block that counts c, and InBlock the index of its count there.
func (g Geometry) BlockOf(c Cluster) int64 { return int64(c) >> g.BlockBits }

// InBlock returns the index of c's count in its refcount block.
func (g Geometry) InBlock(c Cluster) int64 { return int64(c) & (g.BlockCounts - 1) }

// Blocks returns how many refcount blocks count the first n clusters of a file.
func (g Geometry) Blocks(n int64) int64 { return (n + g.BlockCounts - 1) >> g.BlockBits }

// Counted returns the cluster of which count i of a refcount block tells: BlockOf and InBlock the other way round.
func (g Geometry) Counted(block, i int64) Cluster { return Cluster(block<<g.BlockBits + i) }

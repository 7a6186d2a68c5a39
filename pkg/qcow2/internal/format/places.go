package format

// Where things are. With clusters of 64 KiB and counts of 16 bits:
//
//	GuestOffset 0x2_4567_8901   L1Index 18, for an L2 table maps 512 MiB; L2Index 0x567; InCluster 0x8901
//	HostOffset 0x8_0003_8901    Cluster 0x80003
//	Cluster 0x80003             Offset 0x8_0003_0000; BlockOf 16, for a block has 32768 counts; InBlock 3
//
// If entry 0x567 of the L2 table says 0x8_0003_0000, that guest's byte is this one of the file.

// HostOffset is a place in the image's file, in bytes from its start. 0 is the header, so in the entries of tables it means nowhere;
// in a sound image all are below MaxHostOffset. How many bytes something has is an int64.
type HostOffset int64

// Plus returns the place n bytes behind o.
func (o HostOffset) Plus(n int64) HostOffset { return o + HostOffset(n) }

// GuestOffset is a place on the disk, as the guest sees it, in bytes from its start, up to its size. An L1 index, an L2 index and a
// distance from the start of the cluster say the same, see L1Index, L2Index, InCluster and Guest.
type GuestOffset int64

// Plus returns the place n bytes behind o.
func (o GuestOffset) Plus(n int64) GuestOffset { return o + GuestOffset(n) }

// L1Index returns the index of the L1 entry that off is under.
func (g Geometry) L1Index(off GuestOffset) int64 { return int64(off) / g.L2Coverage }

// L2Index returns the index of the L2 entry, in its table, that maps off.
func (g Geometry) L2Index(off GuestOffset) int64 { return g.GuestCluster(off) & (g.L2Entries - 1) }

// InCluster returns how many bytes of off's cluster come before it.
func (g Geometry) InCluster(off GuestOffset) int64 { return int64(off) & (g.ClusterSize - 1) }

// GuestCluster returns the number of the guest cluster in which off lies: the first of the disk is 0.
func (g Geometry) GuestCluster(off GuestOffset) int64 { return int64(off) >> g.ClusterBits }

// Guest returns where the cluster begins that an entry of an L2 table maps.
func (g Geometry) Guest(l1, l2 int64) GuestOffset { return GuestOffset(l1*g.L2Coverage + g.Bytes(l2)) }

// Cluster is the number of a host cluster: the image's file is clusters, from its start on, and 0 is the header's. The first that
// lies behind any file is MaxHostOffset >> ClusterBits. How many clusters there are of something is an int64.
type Cluster int64

// Alone returns the run of c and nothing else.
func (c Cluster) Alone() Run { return Run{c, 1} }

// Aligned tells whether a cluster begins at off.
func (g Geometry) Aligned(off HostOffset) bool { return int64(off)&(g.ClusterSize-1) == 0 }

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

// BlockOf returns the index of the refcount block that counts c, and InBlock the index of its count there.
func (g Geometry) BlockOf(c Cluster) int64 { return int64(c) >> g.BlockBits }

// InBlock returns the index of c's count in its refcount block.
func (g Geometry) InBlock(c Cluster) int64 { return int64(c) & (g.BlockCounts - 1) }

// Blocks returns how many refcount blocks count the first n clusters of a file.
func (g Geometry) Blocks(n int64) int64 { return (n + g.BlockCounts - 1) >> g.BlockBits }

// Counted returns the cluster of which count i of a refcount block tells: BlockOf and InBlock the other way round.
func (g Geometry) Counted(block, i int64) Cluster { return Cluster(block<<g.BlockBits + i) }

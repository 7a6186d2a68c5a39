// Package format is the qcow2 file format: what the bytes of an image's metadata mean, and which of them no image can have. It
// decodes and encodes the header, L1 and L2 tables, refcount blocks, the snapshot table and compressed clusters, and does the
// arithmetic of clusters. It reads files and never writes one; what the metadata is used for is qcow2's.
//
// The specification is docs/interop/qcow2.rst of QEMU's source.
package format

// Limits of the format and of its implementations: QEMU refuses what is larger, so do we.
const (
	MinClusterBits         = 9
	MinExtendedClusterBits = 14
	MaxClusterBits         = 21

	MaxL1Bytes            = 32 << 20
	MaxRefcountTableBytes = 8 << 20
	MaxSnapshots          = 65536
	MaxSnapshotTableBytes = 64 << 20
	MaxSnapshotExtraBytes = 1024

	// SectorSize is the unit that a disk writes whole or not at all.
	SectorSize = 512
)

// Bits of L1, L2 and refcount table entries.
const (
	FlagCopied     = 1 << 63
	FlagCompressed = 1 << 62
	FlagZero       = 1 << 0 // not with extended L2 entries

	// OffsetMask selects bits 9-55, the host offset in L1 and standard L2 entries.
	OffsetMask = 0x00fffffffffffe00
	// MaxHostOffset bounds every host offset: what bits 9-55 can hold.
	MaxHostOffset = 1 << 56

	L1Reserved       = 0x7f000000000001ff
	L2Reserved       = 0x3f000000000001fe
	RefTableReserved = 0x1ff
)

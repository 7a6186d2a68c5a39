package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// An operation that frees space writes new metadata before it frees the old. How much that is, is told here for both who ask:
// the operation that meets a full file system, and whoever keeps room for it ahead of need.

// metadataParts are the parts of an image's metadata that such an operation may write anew, in clusters each.
type metadataParts struct {
	l1, l2, snapshots, refTable, refBlocks int64
}

// room returns how many clusters the operation may take.
func (p metadataParts) room(g format.Geometry) int64 {
	n := p.l1 + p.l2 + p.snapshots + p.refTable + p.refBlocks
	return n + n/g.BlockCounts + 4 // new refcount blocks, for what is new
}

// deletionRoom returns the room that an operation needs now. Called with the allocator's lock held.
func (img *Image) deletionRoom() int64 {
	img.mu.Lock()
	defer img.mu.Unlock()
	p := metadataParts{
		l1:        img.g.Clusters(int64(len(img.l1)) * 8),
		snapshots: img.g.Clusters(img.rowBytes),
		refTable:  img.alloc.rc.tableAt.N,
	}
	for _, e := range img.l1 {
		if e.Offset() != 0 {
			p.l2++
		}
	}
	for _, off := range img.alloc.rc.table {
		if off != 0 {
			p.refBlocks++
		}
	}
	return p.room(img.g)
}

// DeletionRoom returns how many bytes the deletion of a snapshot may write at most before it frees any, as long as the image's
// file is not longer than fileSize bytes. 0 for the zero Header.
func (h Header) DeletionRoom(fileSize int64) int64 {
	if h.h.Version == 0 {
		return 0
	}
	g := h.h.Geometry()
	clusters := g.Clusters(max(fileSize, 0))
	blocks := clusters/g.BlockCounts + 1
	return g.Bytes(metadataParts{
		l1:        g.Clusters(h.h.L1Size * 8),
		l2:        h.h.L1Size,
		snapshots: g.Clusters(min(h.h.Snapshots*snapshotRowBytes, format.MaxSnapshotTableBytes)),
		refTable:  max(h.h.RefTableClusters, g.Clusters(blocks*8)),
		refBlocks: blocks,
	}.room(g))
}

// snapshotRowBytes is what a row of the snapshot table has at most, with a name of 255 bytes.
const snapshotRowBytes = 512

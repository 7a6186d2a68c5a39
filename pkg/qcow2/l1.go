package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// activeL1 returns a copy of the active L1 table with COPIED cleared.
func (img *Image) activeL1() []format.L1Entry {
	img.mu.Lock()
	defer img.mu.Unlock()
	l1 := make([]format.L1Entry, len(img.l1))
	for i, e := range img.l1 {
		l1[i] = e &^ format.FlagCopied
	}
	return l1
}

// snapshotL1 reads a snapshot's L1 table, COPIED flags cleared: QEMU leaves them set.
func (img *Image) snapshotL1(row *format.SnapshotRow) ([]format.L1Entry, error) {
	l1, err := format.ReadL1(img.f, img.g, row.L1Offset, row.L1Size, false)
	if err != nil {
		return nil, fmt.Errorf("%s: L1 table of snapshot %q: %w", img.f.Name(), row.Name, err)
	}
	for i := range l1 {
		l1[i] &^= format.FlagCopied
	}
	return l1, nil
}

// snapshotDiskL1 is snapshotL1 with entries for all of the snapshot's disk.
func (img *Image) snapshotDiskL1(row *format.SnapshotRow) ([]format.L1Entry, error) {
	need := img.g.L1Entries(row.DiskSize)
	if need > format.MaxL1Bytes/8 {
		return nil, fmt.Errorf("%s: %w: disk of %d bytes in snapshot %q", img.f.Name(), ErrLimit, row.DiskSize, row.Name)
	}
	l1, err := img.snapshotL1(row)
	if err != nil {
		return nil, err
	}
	return append(l1, make([]format.L1Entry, max(need-int64(len(l1)), 0))...), nil
}

// checkL1Entry refuses an entry that no legal image holds: its L2 table must not be other metadata.
func (img *Image) checkL1Entry(e format.L1Entry) error {
	if err := e.Check(img.g); err != nil {
		return err
	}
	if img.alloc != nil && img.alloc.metadata.kind(img.g.Cluster(e.Offset())) == metadataSole && e.Offset() != 0 {
		return fmt.Errorf("%w: the L2 table at file offset %#x is other metadata", ErrCorrupt, e.Offset())
	}
	return nil
}

package qcow2

import (
	"fmt"
	"slices"
	"time"
)

// maxSnapshotName is the longest name in bytes: QEMU cuts longer ones off when it lists them.
const maxSnapshotName = 255

// Snapshots returns the snapshots in table order.
func (img *Image) Snapshots() []Snapshot {
	img.mu.Lock()
	defer img.mu.Unlock()
	ss := make([]Snapshot, len(img.rows))
	for i := range img.rows {
		ss[i] = img.rows[i].snapshot()
	}
	return ss
}

// FindSnapshot returns the snapshot that s selects, or ErrNotFound.
func (img *Image) FindSnapshot(s Selector) (Snapshot, error) {
	row, err := img.findRow(s)
	if err != nil {
		return Snapshot{}, err
	}
	return row.snapshot(), nil
}

func (img *Image) findRow(s Selector) (snapshotRow, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	i, err := findSnapshot(img.rows, s)
	if err != nil {
		return snapshotRow{}, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	return img.rows[i], nil
}

// CreateSnapshot takes a snapshot of the active disk: of all requests that completed before the call and none that
// comes after it returns. cut, if not nil, is called once when the instant has come: a frozen file system may
// be thawed. ErrExists if the name is taken, ErrLimit if a limit of the format is reached. If it fails nothing
// has changed.
func (img *Image) CreateSnapshot(name string, cut func()) (Snapshot, error) {
	if name == "" || len(name) > maxSnapshotName {
		return Snapshot{}, fmt.Errorf("%w: a snapshot name has 1 to %d bytes, this one %d", ErrLimit, maxSnapshotName, len(name))
	}
	var row snapshotRow
	err := img.switchGeneration(func(n *generation) error {
		if _, err := findSnapshot(n.row, ByName(name)); err == nil {
			return fmt.Errorf("snapshot %q: %w", name, ErrExists)
		}
		if len(n.row) >= maxSnapshots {
			return fmt.Errorf("%w: %d snapshots", ErrLimit, len(n.row))
		}
		if cut != nil {
			cut()
		}
		now := time.Now()
		row = snapshotRow{
			id: newSnapshotID(n.row), name: name, l1Size: int64(len(n.l1)), diskSize: n.h.size,
			dateSec: uint32(now.Unix()), dateNsec: uint32(now.Nanosecond()), icount: unknownIcount,
		}
		return n.create(&row)
	})
	return row.snapshot(), err
}

// create makes row a snapshot of the active state. The snapshot gets the L2 tables; the active state gets new
// ones, in which nothing is COPIED.
func (n *generation) create(row *snapshotRow) error {
	frozen := make([]l1Entry, len(n.l1))
	for i, e := range n.l1 {
		frozen[i] = e &^ flagCopied
	}
	var err error
	if row.l1Offset, err = n.place(encodeL1(frozen)); err != nil {
		return err
	}
	n.row = append(n.row, *row)

	// A VM's state lies beyond the disk. It belongs to the snapshot alone from now on.
	disk := max(n.g.l1Entries(n.h.size), 1)
	clear(n.l1[min(disk, int64(len(n.l1))):])
	if err := n.reference(n.l1, 1); err != nil {
		return err
	}
	return n.flag()
}

// GotoSnapshot makes the active disk what it was when the snapshot was taken, its size too. ErrNotFound.
func (img *Image) GotoSnapshot(s Selector) error {
	return img.switchGeneration(func(n *generation) error {
		i, err := findSnapshot(n.row, s)
		if err != nil {
			return err
		}
		row := &n.row[i]
		l1, err := img.snapshotL1(row)
		if err != nil {
			return err
		}
		// The old state goes first: narrow refcounts may have no room for both.
		if err := n.reference(n.l1, -1); err != nil {
			return err
		}
		if err := n.reference(l1, 1); err != nil {
			return err
		}
		entries := max(n.g.l1Entries(row.diskSize), int64(len(l1)), 1)
		n.l1 = append(l1, make([]l1Entry, entries-int64(len(l1)))...)
		n.h.size = row.diskSize
		return n.flag()
	})
}

// DeleteSnapshot removes a snapshot and frees what nothing else needs. ErrNotFound; ErrInUse while a View of it is
// open.
func (img *Image) DeleteSnapshot(s Selector) error {
	return img.switchGeneration(func(n *generation) error {
		i, err := findSnapshot(n.row, s)
		if err != nil {
			return err
		}
		row := n.row[i]
		if img.viewed(row.id) {
			return fmt.Errorf("snapshot %q is open: %w", row.name, ErrInUse)
		}
		l1, err := img.snapshotL1(&row)
		if err != nil {
			return err
		}
		if err := n.reference(l1, -1); err != nil {
			return err
		}
		if err := n.dropBytes(row.l1Offset, snapshotL1Bytes(&row)); err != nil {
			return err
		}
		n.row = slices.Delete(n.row, i, i+1)
		return n.flag()
	})
}

// DropActive makes the active disk read as zeros and frees what no snapshot needs.
func (img *Image) DropActive() error {
	return img.switchGeneration(func(n *generation) error {
		if err := n.reference(n.l1, -1); err != nil {
			return err
		}
		clear(n.l1)
		return nil
	})
}

// Resize makes the active disk size bytes large, rounded up to sectors; what is added reads as zeros. It does not shrink: ErrUnsupported.
func (img *Image) Resize(size int64) error {
	return img.switchGeneration(func(n *generation) error {
		have := n.g.l1Entries(n.h.size)
		size = roundToSectors(size)
		need := n.g.l1Entries(size)
		switch {
		case size < n.h.size:
			return fmt.Errorf("%w: shrink from %d to %d bytes", ErrUnsupported, n.h.size, size)
		case need > maxL1Bytes/8:
			return fmt.Errorf("%w: a disk of %d bytes needs more than %d MiB of L1 table", ErrLimit, size, maxL1Bytes>>20)
		case n.h.version < 3 && len(n.row) > 0:
			return fmt.Errorf("%w: resize of a version 2 image with snapshots", ErrUnsupported)
		}
		// What lies beyond the disk, a VM's state, must not become part of it.
		if have < int64(len(n.l1)) {
			if err := n.reference(n.l1[have:], -1); err != nil {
				return err
			}
			clear(n.l1[have:])
		}
		n.l1 = append(n.l1, make([]l1Entry, max(need-int64(len(n.l1)), 0))...)
		n.h.size = size
		return nil
	})
}

// switchGeneration stops guest requests, commits, and replaces the metadata by what change makes of it.
func (img *Image) switchGeneration(change func(*generation) error) error {
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(true); err != nil {
		return err
	}
	if err := img.commitMapping(); err != nil {
		return err // data may wait for the sync before the switch
	}
	n := img.newGeneration()
	if err := change(n); err != nil {
		return n.abort(err)
	}
	return n.commit()
}

// snapshotL1 reads a snapshot's L1 table, COPIED flags cleared: QEMU leaves them set.
func (img *Image) snapshotL1(row *snapshotRow) ([]l1Entry, error) {
	l1, err := readL1(img.f, img.g, row.l1Offset, row.l1Size)
	if err != nil {
		return nil, fmt.Errorf("%s: L1 table of snapshot %q: %w", img.f.Name(), row.name, err)
	}
	for i := range l1 {
		l1[i] &^= flagCopied
	}
	return l1, nil
}

// snapshotL1Bytes is the length of a snapshot's L1 table.
func snapshotL1Bytes(row *snapshotRow) int64 { return row.l1Size * 8 }

package qcow2

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// maxSnapshotName is the longest name in bytes: QEMU cuts longer ones off when it lists them.
const maxSnapshotName = 255

// CreateSnapshot takes a snapshot of the active disk: of all requests that completed before the call and none that
// comes after it returns. Guests wait only for the instant itself, however large the disk is. cut, if not nil, is
// called once at that instant with what the snapshot will be: a frozen file system may be thawed. ErrExists if the name is taken, ErrLimit if a
// limit of the format is reached. If it fails nothing has changed.
//
// This one and the operations below end early, and then change nothing, when ctx does.
func (img *Image) CreateSnapshot(ctx context.Context, name string, cut func(Snapshot)) (Snapshot, error) {
	if err := checkSnapshotName(name); err != nil {
		return Snapshot{}, err
	}
	var row format.SnapshotRow
	var l1 []format.L1Entry
	err := img.change(ctx, operation{
		begin: func(n *generation) error {
			if _, err := findSnapshot(n.row, ByName(name)); err == nil {
				return fmt.Errorf("snapshot %q: %w", name, ErrExists)
			}
			if len(n.row) >= format.MaxSnapshots {
				return fmt.Errorf("%w: %d snapshots", ErrLimit, len(n.row))
			}
			l1 = img.activeL1()
			now := time.Now()
			row = format.SnapshotRow{
				ID: newSnapshotID(n.row), Name: name, L1Size: int64(len(l1)), DiskSize: n.h.Size,
				DateSec: uint32(now.Unix()), DateNsec: uint32(now.Nanosecond()), Icount: format.UnknownIcount,
			}
			n.sharesAll = true
			// A VM's state lies beyond the disk. It belongs to the snapshot alone from now on.
			n.l1Keep = min(n.g.L1Entries(n.h.Size), n.l1Keep)
			if cut != nil {
				cut(newSnapshot(&row))
			}
			return nil
		},
		build: func(n *generation) error { return n.create(&row, l1) },
	})
	return newSnapshot(&row), err
}

func checkSnapshotName(name string) error {
	if name == "" || len(name) > maxSnapshotName {
		return fmt.Errorf("%w: a snapshot name has 1 to %d bytes, this one %d", ErrLimit, maxSnapshotName, len(name))
	}
	return nil
}

// create makes row a snapshot of the state that l1 maps. The snapshot gets its L2 tables; the active state gets new
// ones where COPIED is set, for it shares all that was mapped.
func (n *generation) create(row *format.SnapshotRow, l1 []format.L1Entry) (err error) {
	if len(l1) > 0 { // else it is an empty disk of QEMU's: there is no table to count
		row.L1Offset, err = n.place(format.EncodeL1(l1))
	}
	if err != nil {
		return err
	}
	n.row = append(n.row, *row)
	return n.eachTable(l1[:n.l1Keep], func(i int64, off format.HostOffset, t format.L2Table) error {
		if err := n.scan(off, t); err != nil {
			return err
		}
		changed := n.sawChange(i) // then its flags wait for what it has become
		if err := n.locked(func() error { return n.referenceRuns(off, 1) }); err != nil {
			return err
		}
		if changed || !t.ClearCopied() {
			return nil
		}
		return n.replace(i, off, t)
	})
}

// GotoSnapshot makes the active disk what it was when the snapshot was taken, its size too. Guests wait. ErrNotFound.
func (img *Image) GotoSnapshot(ctx context.Context, s Selector) error {
	return img.change(ctx, operation{stop: true, begin: nothing, build: func(n *generation) error {
		i, err := findSnapshot(n.row, s)
		if err != nil {
			return err
		}
		row := &n.row[i]
		l1, err := img.snapshotDiskL1(row)
		if err != nil {
			return err
		}
		n.l1 = append(l1, make([]format.L1Entry, max(1-len(l1), 0))...)
		n.h.Size = row.DiskSize
		return n.restore(img.activeL1())
	}})
}

// DeleteSnapshot removes a snapshot and frees what nothing else needs. Guests go on; the snapshot is listed until it
// is gone. ErrNotFound; ErrInUse while a View of it is open.
func (img *Image) DeleteSnapshot(ctx context.Context, s Selector) error {
	var row format.SnapshotRow
	return img.change(ctx, operation{
		frees: true,
		begin: func(n *generation) error {
			at, err := findSnapshot(n.row, s)
			if err != nil {
				return err
			}
			row = n.row[at]
			if img.viewed(row.ID) {
				return fmt.Errorf("snapshot %q is open: %w", row.Name, ErrInUse)
			}
			n.deleting = row.ID
			n.row = slices.Delete(n.row, at, at+1)
			return nil
		},
		unlist: func() (err error) {
			row, err = img.unlist(s)
			return err
		},
		build: func(n *generation) error { return n.delete(&row) },
	})
}

// RenameSnapshot gives a snapshot another name; its ID stays. Guests go on. ErrNotFound; ErrExists if another has the name.
func (img *Image) RenameSnapshot(ctx context.Context, s Selector, name string) error {
	if err := checkSnapshotName(name); err != nil {
		return err
	}
	var at int
	return img.change(ctx, operation{
		begin: func(n *generation) (err error) {
			if at, err = findSnapshot(n.row, s); err != nil {
				return err
			}
			if same, err := findSnapshot(n.row, ByName(name)); err == nil && same != at {
				return fmt.Errorf("snapshot %q: %w", name, ErrExists)
			}
			return nil
		},
		build: func(n *generation) error {
			n.row[at].Name = name
			return nil
		},
	})
}

// delete takes away the references of a snapshot that the next generation does not list.
func (n *generation) delete(row *format.SnapshotRow) error {
	l1, err := n.img.snapshotL1(row)
	if err != nil {
		return err
	}
	if err := n.unreference(l1); err != nil {
		return err
	}
	look := false
	if err := n.locked(func() error {
		err := n.drop(row.L1Offset, row.L1Size*8)
		look = n.fell1
		return err
	}); err != nil || !look {
		return err
	}
	return n.flag(n.img.activeL1())
}

// DropActive makes the active disk read as zeros and frees what no snapshot needs. Guests wait.
func (img *Image) DropActive(ctx context.Context) error {
	return img.change(ctx, operation{stop: true, frees: true, begin: nothing, build: func(n *generation) error {
		n.l1 = make([]format.L1Entry, max(n.l1Keep, 1))
		return n.unreference(img.activeL1())
	}})
}

// Resize makes the active disk size bytes large, rounded up to sectors; what is added reads as zeros. Guests wait. It
// does not shrink: ErrUnsupported.
func (img *Image) Resize(ctx context.Context, size int64) error {
	size = format.RoundToSectors(size)
	return img.change(ctx, operation{stop: true, prepare: img.zeroBehindEnd, begin: nothing, build: func(n *generation) error {
		have, need := n.g.L1Entries(n.h.Size), n.g.L1Entries(size)
		switch {
		case size < n.h.Size:
			return fmt.Errorf("%w: shrink from %d to %d bytes", ErrUnsupported, n.h.Size, size)
		case need > format.MaxL1Bytes/8:
			return fmt.Errorf("%w: a disk of %d bytes needs more than %d MiB of L1 table", ErrLimit, size, format.MaxL1Bytes>>20)
		case n.h.Version < 3 && len(n.row) > 0:
			return fmt.Errorf("%w: resize of a version 2 image with snapshots", ErrUnsupported)
		}
		n.h.Size = size
		n.l1 = img.activeL1()
		if have < int64(len(n.l1)) {
			// What lies beyond the disk, a VM's state, must not become part of it.
			if err := n.unreference(n.l1[have:]); err != nil {
				return err
			}
			clear(n.l1[have:])
		}
		n.l1 = append(n.l1, make([]format.L1Entry, max(need-int64(len(n.l1)), 0))...)
		return nil
	}})
}

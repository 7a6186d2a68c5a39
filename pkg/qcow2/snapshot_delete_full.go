package qcow2

import (
	"errors"
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// A file system may be full to its last byte when nobody has kept room on it. A snapshot is deleted then in three steps: it is
// struck off the table; what only it had is punched, which makes room and leaves the counts as they are; and these are put right
// as by any other deletion. Between them a crash leaks.

// unlist strikes a snapshot off the table, durably, and punches what only it had. Called with gate held exclusively, and no
// operation under way.
func (img *Image) unlist(s Selector) (format.SnapshotRow, error) {
	img.mu.Lock()
	rows, old := slices.Clone(img.rows), img.tableClusters()
	img.mu.Unlock()
	at, err := findSnapshot(rows, s)
	if err != nil {
		return format.SnapshotRow{}, err
	}
	row := rows[at]
	if img.viewed(row.ID) {
		return row, fmt.Errorf("snapshot %q is open: %w", row.Name, ErrInUse)
	}
	if img.alloc.searchingLeaks() {
		return row, errors.New("leaks are being looked for")
	}
	l1, err := img.snapshotL1(&row)
	if err != nil {
		return row, err
	}
	if err := img.strike(rows, at); err != nil {
		return row, err
	}
	img.mu.Lock()
	now := img.tableClusters()
	img.mu.Unlock()
	if now.First == old.First {
		old = format.Run{First: now.End(), N: old.N - now.N}
	}
	if err = img.punchSole(l1); err == nil && old.N > 0 {
		err = img.alloc.release(format.Runs{old})
	}
	if err != nil {
		err = fmt.Errorf("snapshot %q is deleted, but what it had is leaked: %w", row.Name, err)
	}
	return row, err
}

// tableClusters returns where the snapshot table is. Called with mu held.
func (img *Image) tableClusters() format.Run {
	return img.g.RunOf(img.hdr.Load().SnapshotsOffset, img.rowBytes)
}

// strike makes the header select the snapshot table without a row: the same one if it is the last row, else a new one.
func (img *Image) strike(rows []format.SnapshotRow, at int) error {
	h := *img.hdr.Load()
	h.Snapshots--
	switch {
	case h.Snapshots == 0:
		h.SnapshotsOffset = 0
	case at < len(rows)-1:
		var err error
		if h.SnapshotsOffset, err = img.placeRows(rows, at); err != nil {
			return err
		}
		if err := img.sync(); err != nil {
			return err
		}
	}
	left, length, err := format.ReadSnapshotTable(img.f, &h)
	if err != nil {
		return err
	}
	if err := img.switchHeader(func(live *format.Header) {
		live.Snapshots, live.SnapshotsOffset = h.Snapshots, h.SnapshotsOffset
	}); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	img.rows, img.rowBytes = left, length
	return nil
}

// placeRows writes a snapshot table without a row, if need be to blocks that were zeros.
func (img *Image) placeRows(rows []format.SnapshotRow, without int) (format.HostOffset, error) {
	b, err := format.EncodeSnapshotTable(slices.Delete(slices.Clone(rows), without, without+1))
	if err != nil {
		return 0, err
	}
	got, err := img.alloc.take(img.g.Clusters(int64(len(b))))
	if err != nil {
		return 0, err
	}
	if len(got) > 1 {
		return 0, img.giveBack(got, fmt.Errorf("%w: no neighbouring clusters for the snapshot table", ErrNoSpace))
	}
	img.alloc.metadata.put(got[0], metadataSole)
	off := img.g.Offset(got[0].First)
	if _, err = img.f.WriteAt(b, int64(off)); errors.Is(err, ErrNoSpace) {
		if err = img.punchZeros(rows); err == nil {
			_, err = img.f.WriteAt(b, int64(off))
		}
	}
	if err != nil {
		return 0, img.giveBack(got, fmt.Errorf("write the snapshot table: %w", err))
	}
	return off, nil
}

// zeroBlock is how many zeros are worth a punch: a block of the usual file systems.
const zeroBlock = 4096

// punchZeros punches blocks of zeros in metadata that is never written in place. It reads as before.
func (img *Image) punchZeros(rows []format.SnapshotRow) error {
	all := format.Runs{{First: 0, N: 1}} // of the header's cluster only the first sector is written
	img.mu.Lock()
	all = append(all, img.tableClusters())
	img.mu.Unlock()
	for i := range rows {
		all = append(all, img.g.RunOf(rows[i].L1Offset, rows[i].L1Size*8))
	}
	b := make([]byte, zeroBlock)
	for _, r := range all {
		for at := img.g.Offset(r.First); at < img.g.Offset(r.End()); at += zeroBlock {
			if err := format.ReadPadded(img.f, b, at); err != nil {
				return err
			}
			if img.g.ClusterSize < zeroBlock || !format.OnlyZeros(b) {
				continue
			}
			if err := img.f.PunchHole(int64(at), zeroBlock); err != nil {
				return err
			}
		}
	}
	return nil
}

// punchSole punches data that is counted once, of a snapshot that is gone. The counts stay, so nobody takes it.
func (img *Image) punchSole(l1 []format.L1Entry) error {
	a := img.alloc
	a.ledger.Lock()
	defer a.ledger.Unlock()
	for _, e := range l1 {
		if e.Offset() == 0 {
			continue
		}
		if err := img.checkL1Entry(e); err != nil {
			return err
		}
		t, err := format.ReadL2(img.f, img.g, e.Offset())
		if err != nil {
			return err
		}
		entries, err := t.EntryRuns(img.g, img.version, nil)
		if err != nil {
			return fmt.Errorf("L2 table at file offset %#x, %w", e.Offset(), err)
		}
		var hosts format.Runs
		for _, r := range entries {
			if err := a.metadata.refuse(r.Hosts); err != nil {
				return fmt.Errorf("L2 table at file offset %#x: %w", e.Offset(), err)
			}
			hosts.Add(r.Hosts)
		}
		if err := a.punchCounted(hosts); err != nil {
			return err
		}
	}
	return nil
}

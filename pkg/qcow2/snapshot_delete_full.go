package qcow2

import (
	"errors"
	"fmt"
	"slices"
)

// A file system may be full to its last byte when nobody has kept room on it. A snapshot is deleted then in three steps: it is
// struck off the table; what only it had is punched, which makes room and leaves the counts as they are; and these are put right
// as by any other deletion. Between them a crash leaks.

// unlist strikes a snapshot off the table, durably, and punches what only it had. Called with gate held exclusively, and no
// operation under way.
func (img *Image) unlist(s Selector) (snapshotRow, error) {
	img.mu.Lock()
	rows, old := slices.Clone(img.rows), img.tableClusters()
	img.mu.Unlock()
	at, err := findSnapshot(rows, s)
	if err != nil {
		return snapshotRow{}, err
	}
	row := rows[at]
	if img.viewed(row.id) {
		return row, fmt.Errorf("snapshot %q is open: %w", row.name, ErrInUse)
	}
	if img.alloc.searching() {
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
	if now.first == old.first {
		old = run{now.end(), old.n - now.n}
	}
	if err = img.punchSole(l1); err == nil && old.n > 0 {
		err = img.alloc.release(runs{old})
	}
	if err != nil {
		err = fmt.Errorf("snapshot %q is deleted, but what it had is leaked: %w", row.name, err)
	}
	return row, err
}

// tableClusters returns where the snapshot table is. Called with mu held.
func (img *Image) tableClusters() run {
	return run{img.hdr.Load().snapshotsOffset >> img.g.clusterBits, img.g.clusters(img.rowBytes)}
}

// strike makes the header select the snapshot table without a row: the same one if it is the last row, else a new one.
func (img *Image) strike(rows []snapshotRow, at int) error {
	h := *img.hdr.Load()
	h.snapshots--
	switch {
	case h.snapshots == 0:
		h.snapshotsOffset = 0
	case at < len(rows)-1:
		var err error
		if h.snapshotsOffset, err = img.placeRows(rows, at); err != nil {
			return err
		}
		if err := img.sync(); err != nil {
			return err
		}
	}
	left, length, err := readSnapshotTable(img.f, &h)
	if err != nil {
		return err
	}
	if err := img.switchHeader(func(live *header) {
		live.snapshots, live.snapshotsOffset = h.snapshots, h.snapshotsOffset
	}); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	img.rows, img.rowBytes = left, length
	return nil
}

// placeRows writes a snapshot table without a row, if need be to blocks that were zeros.
func (img *Image) placeRows(rows []snapshotRow, without int) (int64, error) {
	b, err := encodeSnapshotTable(slices.Delete(slices.Clone(rows), without, without+1))
	if err != nil {
		return 0, err
	}
	got, err := img.alloc.take(img.g.clusters(int64(len(b))))
	if err != nil {
		return 0, err
	}
	if len(got) > 1 {
		return 0, img.giveBack(got, fmt.Errorf("%w: no neighbouring clusters for the snapshot table", ErrNoSpace))
	}
	img.alloc.metadata.put(got[0], metadataSole)
	off := got[0].first << img.g.clusterBits
	if _, err = img.f.WriteAt(b, off); errors.Is(err, ErrNoSpace) {
		if err = img.punchZeros(rows); err == nil {
			_, err = img.f.WriteAt(b, off)
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
func (img *Image) punchZeros(rows []snapshotRow) error {
	all := runs{{0, 1}} // of the header's cluster only the first sector is written
	img.mu.Lock()
	all = append(all, img.tableClusters())
	img.mu.Unlock()
	for i := range rows {
		all = append(all, run{rows[i].l1Offset >> img.g.clusterBits, img.g.clusters(rows[i].l1Size * 8)})
	}
	b := make([]byte, zeroBlock)
	for _, r := range all {
		for at := r.first << img.g.clusterBits; at < r.end()<<img.g.clusterBits; at += zeroBlock {
			if err := readPadded(img.f, b, at); err != nil {
				return err
			}
			if img.g.clusterSize < zeroBlock || !onlyZeros(b) {
				continue
			}
			if err := img.f.PunchHole(at, zeroBlock); err != nil {
				return err
			}
		}
	}
	return nil
}

// punchSole punches data that is counted once, of a snapshot that is gone. The counts stay, so nobody takes it.
func (img *Image) punchSole(l1 []l1Entry) error {
	a := img.alloc
	a.ledger.Lock()
	defer a.ledger.Unlock()
	for _, e := range l1 {
		if e.offset() == 0 {
			continue
		}
		if err := img.checkL1Entry(e); err != nil {
			return err
		}
		t, err := readL2(img.f, img.g, e.offset())
		if err != nil {
			return err
		}
		entries, err := t.entryRuns(img.g, img.version, nil)
		if err != nil {
			return fmt.Errorf("L2 table at file offset %#x, %w", e.offset(), err)
		}
		var hosts runs
		for _, r := range entries {
			if err := a.metadata.refuse(r.hosts); err != nil {
				return fmt.Errorf("L2 table at file offset %#x: %w", e.offset(), err)
			}
			hosts.add(r.hosts)
		}
		if err := a.punchCounted(hosts); err != nil {
			return err
		}
	}
	return nil
}

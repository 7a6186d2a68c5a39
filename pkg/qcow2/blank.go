package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Blank tells whether the image holds nothing: no L2 table, of the disk or of a snapshot, and no cluster in use but for
// the header and the tables that say so. A disk of which all was discarded is not blank, as long as it has the L2 tables
// of what it held; nor is one whose tables are lost, for its clusters are still counted, or lie behind the end of the file.
func (img *Image) Blank() (bool, error) {
	if img.mapsSomething() {
		return false, nil // at once: it needs no operation to end
	}
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	if err := img.begin(0, 0, false); err != nil {
		return false, err
	}
	defer img.end()
	blank, err := img.holdsNothing()
	if err != nil {
		return false, fmt.Errorf("look for content in %s: %w", img.f.Name(), err)
	}
	return blank && !img.mapsSomething(), nil
}

// mapsSomething tells whether the active disk has an L2 table.
func (img *Image) mapsSomething() bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	return hasTable(img.l1)
}

func hasTable(l1 []format.L1Entry) bool {
	for _, e := range l1 {
		if e != 0 {
			return true
		}
	}
	return false
}

// holdsNothing looks at the file alone. Called with changeMu held.
func (img *Image) holdsNothing() (bool, error) {
	h, g := img.hdr.Load(), img.g
	length, err := img.f.Size()
	if err != nil || int64(h.L1Offset)+h.L1Size*8 > length { // a table that was cut off says nothing
		return false, err
	}
	rc, err := loadRefcounts(img.f, g, h)
	if err != nil {
		return false, err
	}
	metadata := map[format.Cluster]bool{0: true}
	note := func(off format.HostOffset, length int64) {
		r := g.RunOf(off, length)
		for c := r.First; c < r.End(); c++ {
			metadata[c] = true
		}
	}
	note(h.RefTableOffset, g.Bytes(h.RefTableClusters))
	note(h.L1Offset, h.L1Size*8)
	note(h.SnapshotsOffset, img.rowBytes)
	for _, row := range img.rows {
		l1, err := format.ReadL1(img.f, g, row.L1Offset, row.L1Size, false)
		if err != nil || hasTable(l1) || int64(row.L1Offset)+row.L1Size*8 > length {
			return false, err
		}
		note(row.L1Offset, row.L1Size*8)
	}
	for _, off := range rc.table {
		if off != 0 {
			note(off, g.ClusterSize)
		}
	}
	return countsOnly(rc, metadata)
}

// countsOnly tells whether no cluster is counted but those of a set.
func countsOnly(rc *refcounts, set map[format.Cluster]bool) (bool, error) {
	for k, off := range rc.table {
		if off == 0 {
			continue
		}
		b, err := rc.read(int64(k), off)
		if err != nil {
			return false, err
		}
		for i := b.counts.NextNonzero(0); i < b.counts.Len(); i = b.counts.NextNonzero(i + 1) {
			if !set[rc.g.Counted(int64(k), i)] {
				return false, nil
			}
		}
	}
	return true, nil
}

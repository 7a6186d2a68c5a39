package qcow2

import "fmt"

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

func hasTable(l1 []l1Entry) bool {
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
	if err != nil || h.l1Offset+h.l1Size*8 > length { // a table that was cut off says nothing
		return false, err
	}
	rc, err := loadRefcounts(img.f, g, h)
	if err != nil {
		return false, err
	}
	metadata := map[int64]bool{0: true} // by cluster
	note := func(off, length int64) {
		for c := off >> g.clusterBits; c < off>>g.clusterBits+g.clusters(length); c++ {
			metadata[c] = true
		}
	}
	note(h.refTableOffset, h.refTableClusters<<g.clusterBits)
	note(h.l1Offset, h.l1Size*8)
	note(h.snapshotsOffset, img.rowBytes)
	for _, row := range img.rows {
		l1, err := readL1(img.f, g, row.l1Offset, row.l1Size, false)
		if err != nil || hasTable(l1) || row.l1Offset+row.l1Size*8 > length {
			return false, err
		}
		note(row.l1Offset, row.l1Size*8)
	}
	for _, off := range rc.table {
		if off != 0 {
			note(off, g.clusterSize)
		}
	}
	return countsOnly(rc, metadata)
}

// countsOnly tells whether no cluster is counted but those of a set.
func countsOnly(rc *refcounts, set map[int64]bool) (bool, error) {
	for k, off := range rc.table {
		if off == 0 {
			continue
		}
		b, err := rc.read(int64(k), off)
		if err != nil {
			return false, err
		}
		for i := b.counts.nextNonzero(0); i < b.counts.len(); i = b.counts.nextNonzero(i + 1) {
			if !set[int64(k)<<rc.g.blockBits+i] {
				return false, nil
			}
		}
	}
	return true, nil
}

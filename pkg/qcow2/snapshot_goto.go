package qcow2

import "bytes"

// restore makes the active state, which old maps, share all that the snapshot with the tables n.l1 holds. What both have
// in common, tables or entries, is not counted anew: its counts are 2 at least, before and after, and it has no COPIED.
func (n *generation) restore(old []l1Entry) error {
	l1 := n.l1
	gone, come := make([]l1Entry, len(old)), make([]l1Entry, len(l1))
	copy(gone, old)
	copy(come, l1)
	for i := range min(len(old), len(l1)) {
		if old[i].offset() == l1[i].offset() {
			gone[i], come[i] = 0, 0
		}
	}
	same, err := n.sameTables(gone, come)
	if err != nil {
		return err
	}
	for _, i := range same {
		l1[i] = old[i] // the table that has its flags right
		gone[i], come[i] = 0, 0
	}
	// The old state goes first: narrow refcounts may have no room for both.
	if err := n.unreference(gone); err != nil {
		return err
	}
	return n.eachTable(come, func(i, off int64, t table) error {
		if err := n.scan(off, t); err != nil {
			return err
		}
		if err := n.locked(func() error { return n.referenceRuns(off, 1) }); err != nil || !t.clearCopied() {
			return err
		}
		return n.replace(i, off, t)
	})
}

// sameTables returns the indexes at which two L1 tables have L2 tables that differ in nothing but COPIED.
func (n *generation) sameTables(a, b []l1Entry) ([]int64, error) {
	var pairs []l1Entry // a and b by turns
	var index []int64
	for i := range min(len(a), len(b)) {
		if a[i].offset() != 0 && b[i].offset() != 0 {
			pairs = append(pairs, a[i], b[i])
			index = append(index, int64(i))
		}
	}
	var same []int64
	first := n.g.newTable()
	err := n.eachTable(pairs, func(k, _ int64, t table) error {
		t.clearCopied()
		if k%2 == 0 {
			copy(first.b, t.b)
		} else if bytes.Equal(first.b, t.b) {
			same = append(same, index[k/2])
		}
		return n.interrupted()
	})
	return same, err
}

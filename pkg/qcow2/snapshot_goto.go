package qcow2

import (
	"bytes"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// restore makes the active state, which old maps, share all that the snapshot with the tables n.l1 holds. What both have
// in common, tables or entries, is not counted anew: its counts are 2 at least, before and after, and it has no COPIED.
func (n *generation) restore(old []format.L1Entry) error {
	l1 := n.l1
	gone, come := make([]format.L1Entry, len(old)), make([]format.L1Entry, len(l1))
	copy(gone, old)
	copy(come, l1)
	for i := range min(len(old), len(l1)) {
		if old[i].Offset() == l1[i].Offset() {
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
	return n.eachTable(come, func(i int64, off format.HostOffset, t format.L2Table) error {
		if err := n.scan(off, t); err != nil {
			return err
		}
		if err := n.locked(func() error { return n.referenceRuns(off, 1) }); err != nil || !t.ClearCopied() {
			return err
		}
		return n.replace(i, off, t)
	})
}

// sameTables returns the indexes at which two L1 tables have L2 tables that differ in nothing but COPIED.
func (n *generation) sameTables(a, b []format.L1Entry) ([]int64, error) {
	var pairs []format.L1Entry // a and b by turns
	var index []int64
	for i := range min(len(a), len(b)) {
		if a[i].Offset() != 0 && b[i].Offset() != 0 {
			pairs = append(pairs, a[i], b[i])
			index = append(index, int64(i))
		}
	}
	var same []int64
	first := n.g.NewTable()
	err := n.eachTable(pairs, func(k int64, _ format.HostOffset, t format.L2Table) error {
		t.ClearCopied()
		if k%2 == 0 {
			copy(first.B, t.B)
		} else if bytes.Equal(first.B, t.B) {
			same = append(same, index[k/2])
		}
		return n.interrupted()
	})
	return same, err
}

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// growTable makes room in the refcount table, whose entries are all in use. The new table and the blocks that count it
// go behind the end of the file, where the old table does not reach, so that they describe themselves; one header
// write switches; then the old table is free. Called with mu held.
func (a *allocator) growTable() error {
	first := max(a.g.Counted(int64(len(a.rc.table)), 0), a.g.ClusterBehind(a.fileEnd()))
	if a.build != nil {
		first = max(first, a.build.searchFrom())
	}
	k := a.g.Blocks(int64(first))
	first = a.g.Counted(k, 0)
	entries, tableClusters, newBlocks := k, int64(0), int64(0)
	for need := k + max(k/2, 1); entries < need; {
		tableClusters = a.g.Clusters(need * 8)
		newBlocks = 1
		for newBlocks < a.g.Blocks(newBlocks+tableClusters) {
			newBlocks++
		}
		entries, need = a.g.Bytes(tableClusters)/8, k+newBlocks
	}
	if a.g.Bytes(tableClusters) > format.MaxRefcountTableBytes {
		return fmt.Errorf("%s: %w: the refcount table would exceed %d MiB", a.f.Name(), ErrLimit, format.MaxRefcountTableBytes>>20)
	}
	used := format.Run{First: first, N: newBlocks + tableClusters}
	if err := a.refuse(used); err != nil {
		return err
	}

	table := make([]format.HostOffset, entries)
	copy(table, a.rc.table)
	all := a.g.NewCounts(newBlocks)
	for i := range used.N {
		all.Set(i, 1)
	}
	for i := range newBlocks {
		table[k+i] = a.g.Offset(first + format.Cluster(i))
	}
	raw := make([]byte, a.g.Bytes(tableClusters))
	for i, off := range table {
		binary.BigEndian.PutUint64(raw[i*8:], uint64(off))
	}
	if _, err := a.f.WriteAt(append(all.B, raw...), int64(a.g.Offset(first))); err != nil {
		return err
	}
	// Blocks that claim has made and not yet linked must not appear in a durable table before their content.
	if err := a.rc.writeBack(); err != nil {
		return err
	}
	if err := a.sync(); err != nil {
		return err
	}
	at := used.Behind(newBlocks)
	if err := a.switchHeader(func(h *format.Header) {
		h.RefTableOffset, h.RefTableClusters = a.g.Offset(at.First), at.N
	}); err != nil {
		return err
	}
	// It is durable: whoever gave up what it points at now would damage it.
	if a.build != nil {
		if err := a.build.mirror(used, 1); err != nil {
			return a.fail(err)
		}
	}
	if err := a.metadata.add(used, metadataSole); err != nil {
		return err
	}
	a.leakSearch.touch(used)
	old := a.rc.tableAt
	a.rc.setTable(table, at)
	a.length.Store(int64(max(a.fileEnd(), a.g.Offset(used.End()))))
	if err := a.releaseLocked(format.Runs{old}); err != nil {
		return a.fail(err)
	}
	return nil
}

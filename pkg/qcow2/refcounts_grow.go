package qcow2

import (
	"encoding/binary"
	"fmt"
)

// growTable makes room in the refcount table, whose entries are all in use. The new table and the blocks that count it
// go behind the end of the file, where the old table does not reach, so that they describe themselves; one header
// write switches; then the old table is free. Called with mu held.
func (a *allocator) growTable() error {
	first := max(int64(len(a.rc.table))<<a.g.blockBits, a.g.clusters(a.length.Load()))
	if a.build != nil {
		first = max(first, a.build.searchFrom())
	}
	k := (first + a.g.blockCounts - 1) >> a.g.blockBits
	first = k << a.g.blockBits
	entries, tableClusters, newBlocks := k, int64(0), int64(0)
	for need := k + max(k/2, 1); entries < need; {
		tableClusters = a.g.clusters(need * 8)
		newBlocks = 1
		for newBlocks<<a.g.blockBits < newBlocks+tableClusters {
			newBlocks++
		}
		entries, need = tableClusters<<a.g.clusterBits/8, k+newBlocks
	}
	if tableClusters<<a.g.clusterBits > maxRefcountTableBytes {
		return fmt.Errorf("%s: %w: the refcount table would exceed %d MiB", a.f.Name(), ErrLimit, maxRefcountTableBytes>>20)
	}
	used := run{first, newBlocks + tableClusters}
	if err := a.refuse(used); err != nil {
		return err
	}

	table := make([]int64, entries)
	copy(table, a.rc.table)
	all := a.g.newCounts(newBlocks)
	for i := range used.n {
		all.set(i, 1)
	}
	for i := range newBlocks {
		table[k+i] = (first + i) << a.g.clusterBits
	}
	raw := make([]byte, tableClusters<<a.g.clusterBits)
	for i, off := range table {
		binary.BigEndian.PutUint64(raw[i*8:], uint64(off))
	}
	if _, err := a.f.WriteAt(append(all.b, raw...), first<<a.g.clusterBits); err != nil {
		return err
	}
	// Blocks that claim has made and not yet linked must not appear in a durable table before their content.
	if err := a.rc.writeBack(); err != nil {
		return err
	}
	if err := a.sync(); err != nil {
		return err
	}
	at := run{first + newBlocks, tableClusters}
	if err := a.switchHeader(func(h *header) {
		h.refTableOffset, h.refTableClusters = at.first<<a.g.clusterBits, at.n
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
	a.search.touch(used)
	old := a.rc.tableAt
	a.rc.setTable(table, at)
	a.length.Store(max(a.length.Load(), used.end()<<a.g.clusterBits))
	if err := a.releaseLocked(runs{old}); err != nil {
		return a.fail(err)
	}
	return nil
}

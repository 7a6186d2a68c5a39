package qcow2

import (
	"fmt"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// replay makes durable what a dead process had acknowledged and not committed. Only what an entry became in the end
// counts: what it was in between has been given up, or would be by the process that is dead.
func (img *Image) replay(l *RedoLog) error {
	if was := l.words[redoCluster]; was != 0 && was != uint64(img.g.ClusterSize) {
		return fmt.Errorf("%w: redo log of an image with clusters of %d bytes", ErrCorrupt, was)
	}
	l.words[redoCluster] = uint64(img.g.ClusterSize)
	tables, err := l.changes(img.g)
	if err != nil {
		return err
	}
	for _, index := range slices.Sorted(maps.Keys(tables)) {
		if err := img.redoTable(index, tables[index]); err != nil {
			return fmt.Errorf("redo changes under active L1 entry %d: %w", index, err)
		}
	}
	if len(tables) > 0 {
		err = img.commit()
	}
	if err == nil {
		l.forget(l.end())
		img.redo = l
	}
	return err
}

// redoTable changes entries of one active L2 table again.
func (img *Image) redoTable(index int64, changed map[int64]format.L2Entry) error {
	keys := slices.Sorted(maps.Keys(changed))
	c := format.Chunk{Table: index, First: keys[0], Last: keys[len(keys)-1]}
	if index >= int64(len(img.l1)) {
		return fmt.Errorf("%w: the L1 table has %d", ErrCorrupt, len(img.l1))
	}
	c.Off = img.g.Guest(index, c.First)
	c.N = img.g.Bytes(c.Last - c.First + 1)
	old, err := img.entries(c)
	if err != nil {
		return err
	}
	es := slices.Clone(old)
	for i, e := range changed {
		is := &es[i-c.First]
		if is.Reference() == e.Reference() && is.Sub == e.Sub {
			continue // it was committed; whether the cluster is shared by now, the image knows
		}
		if *is, err = img.redoEntry(e); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	if slices.Equal(old, es) {
		return nil
	}
	if err := img.ownTable(index); err != nil {
		return err
	}
	return img.setEntries(c, old, es, true)
}

// redoEntry checks an entry of the log: its host cluster must be counted. COPIED is what the count says.
func (img *Image) redoEntry(e format.L2Entry) (format.L2Entry, error) {
	if err := e.Check(img.g, img.version); err != nil {
		return e, err
	}
	if e.Desc&format.FlagCompressed != 0 {
		return e, fmt.Errorf("%w: guests write no compressed clusters", ErrCorrupt)
	}
	if e.Offset() == 0 {
		return e, nil
	}
	n, err := img.alloc.count(img.g.Cluster(e.Offset()))
	if err == nil && n == 0 {
		err = fmt.Errorf("%w: host cluster at %#x is free", ErrCorrupt, e.Offset())
	}
	return e.WithCopied(n == 1), err
}

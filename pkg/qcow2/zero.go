package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// WriteZeroes makes n bytes at off read as zeros. Host clusters that the active state owns are kept, so that a
// later write there cannot run out of space.
func (img *Image) WriteZeroes(off, n int64) error {
	return img.eachToZero(off, n, func(e format.L2Entry) format.L2Entry {
		switch {
		case img.version < 3 || !e.Own():
			return img.zeroEntry()
		}
		return format.L2Entry{Desc: e.Desc, Sub: format.SubZero}
	})
}

// Discard makes n bytes at off read as zeros and gives up the host clusters of whole clusters. The file system
// gets them back after the next Flush, unless a snapshot needs them.
func (img *Image) Discard(off, n int64) error {
	return img.eachToZero(off, n, func(format.L2Entry) format.L2Entry { return img.zeroEntry() })
}

// maxZeroed is how many bytes one change of the mapping zeroes at most.
func maxZeroed(g format.Geometry) int64 { return min(g.L2Coverage, g.Bytes(maxRedoEntries)) }

// zeroEntry maps a cluster that reads as zeros: no backing file is ever behind an unallocated one.
func (img *Image) zeroEntry() format.L2Entry { return format.L2Entry{} }

// eachToZero replaces the entry of each whole cluster that does not read as zeros by replace's, and writes zeros
// to the parts of clusters at the ends.
func (img *Image) eachToZero(off, n int64, replace func(format.L2Entry) format.L2Entry) error {
	err := img.toZero(off, n, replace)
	if err == nil {
		err = img.relieve()
	}
	return img.judge(err)
}

func (img *Image) toZero(off, n int64, replace func(format.L2Entry) format.L2Entry) error {
	if err := img.begin(off, n, true); err != nil {
		return err
	}
	defer img.end()
	zero := func(c format.Chunk) error {
		unlock := img.lock(c, true)
		defer unlock()
		for _, part := range img.g.WholeClusters(c, img.Size()) {
			if err := img.withSpace(func() error { return img.zeroPart(part, replace) }); err != nil {
				return err
			}
		}
		return nil
	}
	for at, end := format.GuestOffset(off), format.GuestOffset(off+n); ; {
		first, behind := img.tabled(at, end)
		if first == end {
			return nil
		}
		if err := img.g.Parts(first, int64(behind-first), maxZeroed(img.g), zero); err != nil {
			return err
		}
		at = behind
	}
}

// tabled returns the first stretch of the disk from at to end for which there are L2 tables: from end to end if there is none.
// All else reads as zeros, and of a huge disk it is nearly all.
func (img *Image) tabled(at, end format.GuestOffset) (first, behind format.GuestOffset) {
	img.mu.Lock()
	defer img.mu.Unlock()
	has := func(at format.GuestOffset) bool { return img.l1[img.g.L1Index(at)] != 0 }
	next := func(at format.GuestOffset) format.GuestOffset { return min(end, at.Plus(img.g.UpToTable(at))) }
	for at < end && !has(at) {
		at = next(at)
	}
	for behind = at; behind < end && has(behind); {
		behind = next(behind)
	}
	return at, behind
}

// zeroPart makes one part read as zeros: c is whole clusters, or lies in one.
func (img *Image) zeroPart(c format.Chunk, replace func(format.L2Entry) format.L2Entry) error {
	old, err := img.mappedEntries(c)
	if err != nil || old == nil {
		return err
	}
	whole := img.g.InCluster(c.Off) == 0 && (img.g.InCluster(c.End()) == 0 || int64(c.End()) == img.Size())
	es := make([]format.L2Entry, len(old))
	changed := false
	for i, e := range old {
		es[i] = e
		if !e.Kind().ReadsZero() || whole && e.Kind() == format.KindZeroAlloc {
			es[i] = replace(e)
		}
		changed = changed || es[i] != e
	}
	switch {
	case !changed:
		return nil
	case !whole:
		return img.writeMapping(c, make([]byte, c.N))
	}
	if err := img.ownTable(c.Table); err != nil {
		return err
	}
	return img.setEntries(c, old, es, false)
}

// zeroBehindEnd makes what the last L2 table maps behind the end of the disk read as zeros. A shrunk disk has its old
// content there, and so has a snapshot whose row names a smaller disk than its tables: growth must not show it.
func (img *Image) zeroBehindEnd() error {
	if err := img.begin(0, 0, true); err != nil {
		return err
	}
	defer img.end()
	size := img.Size()
	end := img.g.L1Entries(size) * img.g.L2Coverage
	return img.g.Parts(format.GuestOffset(size), end-size, maxZeroed(img.g), func(c format.Chunk) error {
		unlock := img.lock(c, true)
		defer unlock()
		for _, part := range img.g.WholeClusters(c, end) {
			if err := img.zeroPart(part, func(format.L2Entry) format.L2Entry { return img.zeroEntry() }); err != nil {
				return err
			}
		}
		return nil
	})
}

package qcow2

import (
	"cmp"
	"fmt"
	"slices"
)

// mendL1Tables takes out of each L1 table what cannot be, and finds the L2 tables.
func (b *rebuild) mendL1Tables() error {
	for i := range b.l1 {
		if err := b.mendL1Table(&b.l1[i]); err != nil {
			return err
		}
		if i == 0 { // the active one
			for j := range b.l2 {
				b.l2[j].active = b.l2References(b.l2[j].offset)
			}
		}
	}
	for j := range b.l2 {
		b.l2[j].times = b.l2References(b.l2[j].offset)
		b.vacate(b.l2[j].offset, b.g.clusterSize) // data counts before: settleL2Tables
	}
	slices.SortFunc(b.l2, func(a, c l2Region) int { return cmp.Compare(a.offset, c.offset) })
	return nil
}

func (b *rebuild) l2References(off int64) int64 {
	k, i := b.group(off >> b.g.clusterBits)
	return int64(k.refs.get(i))
}

// mendL1Table writes a table that has to change to a new place.
func (b *rebuild) mendL1Table(l1 *l1Region) error {
	if err := b.stop(); err != nil {
		return err
	}
	raw := make([]byte, l1.entries*8)
	if err := readPadded(b.file, raw, l1.offset); err != nil {
		return err
	}
	es := decodeL1(raw)
	changed := b.behindEnd(*l1)
	if changed {
		b.r.note("%s, at %#x, was behind the end of the file: it is zeros", l1.from.use, l1.offset)
	}
	for i, e := range es {
		if e == 0 {
			continue
		}
		mended, why := b.mendL1Entry(e)
		if mended == e {
			continue
		}
		es[i], changed = mended, true
		from := origin{use: useL2, table: l1.offset, index: int64(i)}
		if mended == 0 {
			b.r.lose("%s, %#x, was removed: %s", from, uint64(e), why)
		} else {
			b.r.note("%s: %#x became %#x: %s", from, uint64(e), uint64(mended), why)
		}
	}
	if !changed {
		return nil
	}
	at, err := b.write(l1.from.use, encodeL1(es))
	l1.offset = at
	return err
}

// mendL1Entry returns what is right of an entry, and why not all of it, and counts its L2 table.
func (b *rebuild) mendL1Entry(e l1Entry) (mended l1Entry, why string) {
	off := e.offset()
	switch {
	case off == 0:
		return 0, "there is no table at offset 0"
	case !b.g.aligned(off):
		return 0, "not aligned to a cluster"
	case off >= b.length:
		return 0, "behind the end of the file"
	}
	mended, why = e&^l1Reserved, "reserved bits"
	k, i := b.group(off >> b.g.clusterBits)
	if k.refs.get(i) == b.maxCount() {
		at, err := b.copy(useL2, off, b.g.clusterSize)
		if err != nil {
			return 0, err.Error()
		}
		mended, why = l1Entry(at)|mended&flagCopied, tooMany
		k, i = b.group(at >> b.g.clusterBits)
	}
	if k.refs.set(i, k.refs.get(i)+1); k.refs.get(i) == 1 {
		b.l2 = append(b.l2, l2Region{offset: mended.offset()})
	}
	return mended, why
}

const tooMany = "a copy, for there were more references than a refcount can hold"

// copy copies n bytes at off for one of too many references, as long as the copies do not outgrow the file.
func (b *rebuild) copy(use clusterUse, off, n int64) (int64, error) {
	from, end := off>>b.g.clusterBits, b.g.clusters(off+n)
	if b.copied += (end - from) << b.g.clusterBits; b.copied > b.length {
		return 0, fmt.Errorf("%w: more references than a refcount can hold, and too many to make copies", ErrLimit)
	}
	content := make([]byte, (end-from)<<b.g.clusterBits)
	err := readPadded(b.file, content, from<<b.g.clusterBits)
	at := int64(0)
	if err == nil {
		at, err = b.write(use, content)
	}
	b.failure = cmp.Or(b.failure, err)
	return at + b.g.inCluster(off), err
}

func (b *rebuild) maxCount() uint64 { return counts{order: b.g.refcountOrder}.max() }

// mendL2Tables takes out of each L2 table what cannot be, and counts the clusters that it maps. Tables that have to
// change are written to a new place.
func (b *rebuild) mendL2Tables() error {
	b.progress = b.nextPhase()
	return b.eachL2Table(b.l2, func(t table, l2 l2Region) error {
		changed := false
		for i := range t.len() {
			e := t.entry(i)
			if e == (l2Entry{}) {
				continue
			}
			mended, why := b.mendL2Entry(e, l2.times)
			if mended == e {
				continue
			}
			t.set(i, mended)
			changed = true
			from := origin{use: useData, table: l2.offset, index: i}
			if mended == (l2Entry{}) {
				b.r.lose("%s, %#x, was removed: %s", from, e.desc, why)
			} else {
				b.r.note("%s: %#x %#x became %#x %#x: %s", from, e.desc, uint64(e.sub), mended.desc, uint64(mended.sub), why)
			}
		}
		if !changed {
			return nil
		}
		return b.move(l2.offset, t)
	})
}

func (b *rebuild) nextPhase() func(done, total int64) {
	if p := b.r.nextPhase(); p != nil {
		return p
	}
	return func(_, _ int64) {}
}

// move writes the L2 table that was at off to a new place, or again to the one that it has.
func (b *rebuild) move(off int64, t table) error {
	if at, ok := b.moved[off]; ok {
		_, err := b.file.WriteAt(t.b, at)
		return err
	}
	at, err := b.write(useL2, t.b)
	b.moved[off] = at
	return err
}

// mendL2Entry returns what is right of an entry of a table that times paths lead to, and why not all of it, and counts
// its clusters.
func (b *rebuild) mendL2Entry(e l2Entry, times int64) (mended l2Entry, why string) {
	if e.kind() == kindCompressed {
		off, n := e.compressed(b.g)
		if off < b.g.clusterSize || off+n-b.length >= b.g.clusterSize || off >= b.length {
			return l2Entry{}, "not within the file"
		}
		mended, why = l2Entry{desc: e.desc &^ flagCopied}, "compressed clusters have neither COPIED nor subclusters"
		if b.count(useCompressed, off, n, times) {
			return mended, why
		}
		at, err := b.copy(useCompressed, off, n)
		if err != nil {
			return l2Entry{}, err.Error()
		}
		b.count(useCompressed, at, n, times)
		return mended.withCompressed(b.g, at), tooMany
	}
	mended, why = b.mendStandard(e)
	switch off := mended.offset(); {
	case off == 0:
	case !b.g.aligned(off):
		return l2Entry{}, "not aligned to a cluster"
	case off >= b.length:
		return l2Entry{}, "behind the end of the file"
	case !b.count(useData, off, b.g.clusterSize, times):
		at, err := b.copy(useData, off, b.g.clusterSize)
		if err != nil {
			return l2Entry{}, err.Error()
		}
		b.count(useData, at, b.g.clusterSize, times)
		mended.desc, why = mended.desc&^offsetMask|uint64(at), tooMany
	}
	return mended, why
}

// mendStandard corrects all but the offset of an entry that is not compressed.
func (b *rebuild) mendStandard(e l2Entry) (mended l2Entry, why string) {
	mended = e
	if mended.desc &^= l2Reserved | flagZero; mended != e {
		why = "reserved bits"
	}
	allocated, zero := mended.sub&subAllocated, mended.sub>>subclusters
	switch {
	case zero != 0 && b.h.version < 3:
		mended.sub, why = 0, "version 2 has no zero flag"
		if mended.offset() != 0 {
			mended.sub = subAllocated
		}
	case allocated&zero != 0:
		mended.sub, why = mended.sub&^(allocated&zero), "subclusters that are allocated and zero read as zeros"
	}
	if mended.offset() == 0 && mended.sub&subAllocated != 0 {
		mended.sub, why = mended.sub&subZero, "allocated subclusters without a host cluster"
	}
	return mended, why
}

// count counts a reference from times paths to n bytes at off, if every count has room for it.
func (b *rebuild) count(use clusterUse, off, n, times int64) bool {
	first, end := off>>b.g.clusterBits, b.g.clusters(off+n)
	for cluster := first; cluster < end; cluster++ {
		if k, i := b.group(cluster); b.maxCount()-k.refs.get(i) < uint64(times) {
			return false
		}
	}
	for cluster := first; cluster < end; cluster++ {
		k, i := b.group(cluster)
		k.refs.set(i, k.refs.get(i)+uint64(times))
		k.setUse(i, use)
	}
	return true
}

// flagL2Tables sets COPIED in the active L2 tables where the only reference to a cluster is theirs, and nowhere else.
func (b *rebuild) flagL2Tables() error {
	active := slices.DeleteFunc(slices.Clone(b.l2), func(l2 l2Region) bool { return l2.active == 0 })
	b.progress = b.nextPhase()
	return b.eachL2Table(active, func(t table, l2 l2Region) error {
		if at, ok := b.moved[l2.offset]; ok {
			if err := readPadded(b.file, t.b, at); err != nil {
				return err
			}
		}
		changed := int64(0)
		for i := range t.len() {
			e := t.entry(i)
			if e.kind() == kindCompressed || e.offset() == 0 {
				continue
			}
			k, j := b.group(e.offset() >> b.g.clusterBits)
			if flagged := e.withCopied(k.refs.get(j) == 1); flagged != e {
				t.set(i, flagged)
				changed++
			}
		}
		if changed == 0 {
			return nil
		}
		b.r.note("COPIED was corrected in %d entries of the L2 table at %#x", changed, l2.offset)
		return b.move(l2.offset, t)
	})
}

package fsck

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
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
		b.vacate(b.l2[j].offset, b.g.ClusterSize) // data counts before: placeL2Tables
	}
	slices.SortFunc(b.l2, func(a, c l2Region) int { return cmp.Compare(a.offset, c.offset) })
	return nil
}

func (b *rebuild) l2References(off format.HostOffset) int64 {
	k, i := b.group(b.g.Cluster(off))
	return int64(k.refs.get(i))
}

// mendL1Table writes a table that has to change to a new place.
func (b *rebuild) mendL1Table(l1 *l1Region) error {
	if err := b.stop(); err != nil {
		return err
	}
	raw := make([]byte, l1.entries*8)
	if err := format.ReadPadded(b.file, raw, l1.offset); err != nil {
		return err
	}
	es := format.DecodeL1(raw)
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
	at, err := b.write(l1.from.use, format.EncodeL1(es))
	l1.offset = at
	return err
}

// mendL1Entry returns what is right of an entry, and why not all of it, and counts its L2 table.
func (b *rebuild) mendL1Entry(e format.L1Entry) (mended format.L1Entry, why string) {
	off := e.Offset()
	switch {
	case off == 0:
		return 0, "there is no table at offset 0"
	case !b.g.Aligned(off):
		return 0, "not aligned to a cluster"
	case off >= b.length:
		return 0, "behind the end of the file"
	}
	mended, why = e&^format.L1Reserved, "reserved bits"
	k, i := b.group(b.g.Cluster(off))
	if k.refs.get(i) == b.maxCount() {
		at, err := b.copy(useL2, off, b.g.ClusterSize)
		if err != nil {
			return 0, err.Error()
		}
		mended, why = format.L1Entry(at)|mended&format.FlagCopied, tooMany
		k, i = b.group(b.g.Cluster(at))
	}
	if k.refs.set(i, k.refs.get(i)+1); k.refs.get(i) == 1 {
		b.l2 = append(b.l2, l2Region{offset: mended.Offset()})
	}
	return mended, why
}

const tooMany = "a copy, for there were more references than a refcount can hold"

// copy copies n bytes at off for one of too many references, as long as the copies do not outgrow the file.
func (b *rebuild) copy(use clusterUse, off format.HostOffset, n int64) (format.HostOffset, error) {
	from := b.g.RunOf(off, n)
	if b.copied += b.g.Bytes(from.N); b.copied > int64(b.length) {
		return 0, fmt.Errorf("%w: more references than a refcount can hold, and too many to make copies", format.ErrLimit)
	}
	content := make([]byte, b.g.Bytes(from.N))
	err := format.ReadPadded(b.file, content, b.g.Offset(from.First))
	at := format.HostOffset(0)
	if err == nil {
		at, err = b.write(use, content)
	}
	b.failure = cmp.Or(b.failure, err)
	return at + off - b.g.Offset(from.First), err
}

func (b *rebuild) maxCount() uint64 { return format.Counts{Order: b.g.RefcountOrder}.Max() }

// mendL2Tables takes out of each L2 table what cannot be, and counts the clusters that it maps. Tables that have to
// change are written to a new place.
func (b *rebuild) mendL2Tables() error {
	b.progress = b.nextPhase()
	return b.eachL2Table(b.l2, func(t format.L2Table, l2 l2Region) error {
		changed := false
		for i := range t.Len() {
			e := t.Entry(i)
			if e == (format.L2Entry{}) {
				continue
			}
			mended, why := b.mendL2Entry(e, l2.times)
			if mended == e {
				continue
			}
			t.Set(i, mended)
			changed = true
			from := origin{use: useData, table: l2.offset, index: i}
			if mended == (format.L2Entry{}) {
				b.r.lose("%s, %#x, was removed: %s", from, e.Desc, why)
			} else {
				b.r.note("%s: %#x %#x became %#x %#x: %s", from, e.Desc, uint64(e.Sub), mended.Desc, uint64(mended.Sub), why)
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
func (b *rebuild) move(off format.HostOffset, t format.L2Table) error {
	if at, ok := b.moved[off]; ok {
		_, err := b.file.WriteAt(t.B, int64(at))
		return err
	}
	at, err := b.write(useL2, t.B)
	b.moved[off] = at
	return err
}

// mendL2Entry returns what is right of an entry of a table that times paths lead to, and why not all of it, and counts
// its clusters.
func (b *rebuild) mendL2Entry(e format.L2Entry, times int64) (mended format.L2Entry, why string) {
	if e.Kind() == format.KindCompressed {
		off, n := e.Compressed(b.g)
		if b.g.Cluster(off) == 0 || int64(off.Plus(n)-b.length) >= b.g.ClusterSize || off >= b.length {
			return format.L2Entry{}, "not within the file"
		}
		mended, why = format.L2Entry{Desc: e.Desc &^ format.FlagCopied}, "compressed clusters have neither COPIED nor subclusters"
		if b.count(useCompressed, off, n, times) {
			return mended, why
		}
		at, err := b.copy(useCompressed, off, n)
		if err != nil {
			return format.L2Entry{}, err.Error()
		}
		b.count(useCompressed, at, n, times)
		return mended.WithCompressed(b.g, at), tooMany
	}
	mended, why = b.mendStandard(e)
	switch off := mended.Offset(); {
	case off == 0:
	case !b.g.Aligned(off):
		return format.L2Entry{}, "not aligned to a cluster"
	case off >= b.length:
		return format.L2Entry{}, "behind the end of the file"
	case !b.count(useData, off, b.g.ClusterSize, times):
		at, err := b.copy(useData, off, b.g.ClusterSize)
		if err != nil {
			return format.L2Entry{}, err.Error()
		}
		b.count(useData, at, b.g.ClusterSize, times)
		mended.Desc, why = mended.Desc&^format.OffsetMask|uint64(at), tooMany
	}
	return mended, why
}

// mendStandard corrects all but the offset of an entry that is not compressed.
func (b *rebuild) mendStandard(e format.L2Entry) (mended format.L2Entry, why string) {
	mended = e
	if mended.Desc &^= format.L2Reserved | format.FlagZero; mended != e {
		why = "reserved bits"
	}
	allocated, zero := mended.Sub&format.SubAllocated, mended.Sub>>format.Subclusters
	switch {
	case zero != 0 && b.h.Version < 3:
		mended.Sub, why = 0, "version 2 has no zero flag"
		if mended.Offset() != 0 {
			mended.Sub = format.SubAllocated
		}
	case allocated&zero != 0:
		mended.Sub, why = mended.Sub&^(allocated&zero), "subclusters that are allocated and zero read as zeros"
	}
	if mended.Offset() == 0 && mended.Sub&format.SubAllocated != 0 {
		mended.Sub, why = mended.Sub&format.SubZero, "allocated subclusters without a host cluster"
	}
	return mended, why
}

// count counts a reference from times paths to n bytes at off, if every count has room for it.
func (b *rebuild) count(use clusterUse, off format.HostOffset, n, times int64) bool {
	r := b.g.RunOf(off, n)
	for cluster := r.First; cluster < r.End(); cluster++ {
		if k, i := b.group(cluster); b.maxCount()-k.refs.get(i) < uint64(times) {
			return false
		}
	}
	for cluster := r.First; cluster < r.End(); cluster++ {
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
	return b.eachL2Table(active, func(t format.L2Table, l2 l2Region) error {
		if at, ok := b.moved[l2.offset]; ok {
			if err := format.ReadPadded(b.file, t.B, at); err != nil {
				return err
			}
		}
		changed := int64(0)
		for i := range t.Len() {
			e := t.Entry(i)
			if e.Kind() == format.KindCompressed || e.Offset() == 0 {
				continue
			}
			k, j := b.group(b.g.Cluster(e.Offset()))
			if flagged := e.WithCopied(k.refs.get(j) == 1); flagged != e {
				t.Set(i, flagged)
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

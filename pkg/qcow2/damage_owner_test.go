package qcow2

import (
	"maps"
	"slices"
	"testing"
)

// This file says which clusters of a damaged image still have one owner beyond doubt: what they hold must read the same
// after a repair. It walks the tables of the undamaged image by itself, so that no mistake of check or repair is shared.

// word is 8 bytes of metadata that a damage has changed.
type word struct {
	at       int64
	old, now uint64
}

// owners tells what the words put in doubt.
type owners struct {
	t         *testing.T
	f         *memFile // damaged
	g         geometry
	changed   map[int64]bool // words on which more depends than COPIED
	contested map[int64]bool // host clusters that damaged references lead to
}

func newOwners(t *testing.T, f *memFile, h *header, words []word) *owners {
	t.Helper()
	o := &owners{t: t, f: f, g: h.geometry(), changed: map[int64]bool{}, contested: map[int64]bool{}}
	for _, w := range words {
		if w.old^w.now != flagCopied {
			o.changed[w.at] = true
		}
	}
	return o
}

// contest marks the host clusters of n bytes at off as claimed by something new, and if it is taken for L2 tables, what
// these lead to.
func (o *owners) contest(off, n int64, tables bool) {
	if off < 0 || off >= o.f.content.size {
		return
	}
	for c := off >> o.g.clusterBits; c < o.g.clusters(off+n); c++ {
		o.contested[c] = true
	}
	if !tables {
		return
	}
	t := o.g.newTable()
	if readPadded(o.f, t.b, off&^(o.g.clusterSize-1)) != nil {
		return
	}
	for i := range t.len() {
		o.contestEntry(t.entry(i))
	}
}

func (o *owners) contestEntry(e l2Entry) {
	if e.kind() == kindCompressed {
		off, n := e.compressed(o.g)
		o.contest(off, n, false)
	} else if off := int64(e.desc & offsetMask); off != 0 {
		o.contest(off, o.g.clusterSize, false)
	}
}

// undoubted takes out of what the undamaged image holds whatever is in doubt: of snapshots all, unless their table is
// sound.
func (o *owners) undoubted(sound *memFile, h *header, snapshots bool) content {
	o.t.Helper()
	all := readable(o.t, sound)
	roots := map[string]l1Region{"": {offset: h.l1Offset, entries: h.l1Size}}
	if snapshots {
		rows, _, err := scanSnapshotTable(sound, h)
		must(o.t, err)
		for _, r := range rows {
			if _, ok := all["snapshot "+r.id]; ok {
				roots["snapshot "+r.id] = l1Region{offset: r.l1Offset, entries: r.l1Size}
			}
		}
	}
	// First all that the damage claims, then who is not touched by it.
	for _, root := range roots {
		o.walk(o.f, root, func(_ int64, l1At, l2At int64, e l2Entry) {
			if o.changed[l2At] {
				o.contestEntry(e)
			}
			if o.changed[l1At] {
				o.contest(int64(get64(o.f, l1At)&offsetMask), o.g.clusterSize, true)
			}
		})
	}
	left := content{}
	for name, root := range roots {
		left[name] = maps.Clone(all[name])
		sure := map[int64]bool{}
		o.walk(sound, root, func(guest, l1At, l2At int64, e l2Entry) {
			first, n := e.hostClusters(o.g)
			hosts := run{first, n}
			table := l2At >> o.g.clusterBits
			doubt := o.changed[l1At] || o.changed[l2At] || o.g.extended && o.changed[l2At+8] || o.contested[table] ||
				slices.ContainsFunc(slices.Collect(maps.Keys(o.contested)), hosts.has)
			sure[guest] = !doubt
		})
		for guest := range left[name] {
			if !sure[guest] {
				delete(left[name], guest)
			}
		}
	}
	return left
}

// walk calls fn for each guest cluster of an L1 table of f, with the places of its L1 and L2 entries. Without an L2 table both
// are the same.
func (o *owners) walk(f *memFile, root l1Region, fn func(guest, l1At, l2At int64, e l2Entry)) {
	o.t.Helper()
	for i := range root.entries {
		l1At := root.offset + 8*i
		off := int64(get64(f, l1At) & offsetMask)
		if off == 0 || off >= f.content.size || !o.g.aligned(off) {
			for guest := i * o.g.l2Coverage; guest < (i+1)*o.g.l2Coverage; guest += o.g.clusterSize {
				fn(guest, l1At, l1At, l2Entry{})
			}
			continue
		}
		t := o.g.newTable()
		must(o.t, readPadded(f, t.b, off))
		size := int64(len(t.b)) / t.len()
		for j := range t.len() {
			fn(i*o.g.l2Coverage+j<<o.g.clusterBits, l1At, off+j*size, t.entry(j))
		}
	}
}

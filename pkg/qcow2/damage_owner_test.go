package qcow2

import (
	"maps"
	"slices"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
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
	g         format.Geometry
	changed   map[int64]bool          // words on which more depends than COPIED
	contested map[format.Cluster]bool // host clusters that damaged references lead to
}

func newOwners(t *testing.T, f *memFile, h *format.Header, words []word) *owners {
	t.Helper()
	o := &owners{t: t, f: f, g: h.Geometry(), changed: map[int64]bool{}, contested: map[format.Cluster]bool{}}
	for _, w := range words {
		if w.old^w.now != format.FlagCopied {
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
	r := o.g.RunOf(format.HostOffset(off), n)
	for c := r.First; c < r.End(); c++ {
		o.contested[c] = true
	}
	if !tables {
		return
	}
	t := o.g.NewTable()
	if format.ReadPadded(o.f, t.B, o.g.Offset(o.g.Cluster(format.HostOffset(off)))) != nil {
		return
	}
	for i := range t.Len() {
		o.contestEntry(t.Entry(i))
	}
}

func (o *owners) contestEntry(e format.L2Entry) {
	if e.Kind() == format.KindCompressed {
		off, n := e.Compressed(o.g)
		o.contest(int64(off), n, false)
	} else if off := int64(e.Desc & format.OffsetMask); off != 0 {
		o.contest(off, o.g.ClusterSize, false)
	}
}

// undoubted takes out of what the undamaged image holds whatever is in doubt: of snapshots all, unless their table is
// sound.
func (o *owners) undoubted(sound *memFile, h *format.Header, snapshots bool) content {
	o.t.Helper()
	all := readable(o.t, sound)
	roots := map[string]rootTable{"": {offset: int64(h.L1Offset), entries: h.L1Size}}
	if snapshots {
		rows, _, err := format.ScanSnapshotTable(sound, h)
		must(o.t, err)
		for _, r := range rows {
			if _, ok := all["snapshot "+r.ID]; ok {
				roots["snapshot "+r.ID] = rootTable{offset: int64(r.L1Offset), entries: r.L1Size}
			}
		}
	}
	// First all that the damage claims, then who is not touched by it.
	for _, root := range roots {
		o.walk(o.f, root, func(_ int64, l1At, l2At int64, e format.L2Entry) {
			if o.changed[l2At] {
				o.contestEntry(e)
			}
			if o.changed[l1At] {
				o.contest(int64(get64(o.f, l1At)&format.OffsetMask), o.g.ClusterSize, true)
			}
		})
	}
	left := content{}
	for name, root := range roots {
		left[name] = maps.Clone(all[name])
		sure := map[int64]bool{}
		o.walk(sound, root, func(guest, l1At, l2At int64, e format.L2Entry) {
			hosts, table := e.HostClusters(o.g), o.g.Cluster(format.HostOffset(l2At))
			doubt := o.changed[l1At] || o.changed[l2At] || o.g.Extended && o.changed[l2At+8] || o.contested[table] ||
				slices.ContainsFunc(slices.Collect(maps.Keys(o.contested)), hosts.Has)
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

// rootTable is an L1 table.
type rootTable struct{ offset, entries int64 }

// walk calls fn for each guest cluster of an L1 table of f, with the places of its L1 and L2 entries. Without an L2 table both
// are the same.
func (o *owners) walk(f *memFile, root rootTable, fn func(guest, l1At, l2At int64, e format.L2Entry)) {
	o.t.Helper()
	for i := range root.entries {
		l1At := root.offset + 8*i
		off := int64(get64(f, l1At) & format.OffsetMask)
		if off == 0 || off >= f.content.size || !o.g.Aligned(format.HostOffset(off)) {
			for guest := i * o.g.L2Coverage; guest < (i+1)*o.g.L2Coverage; guest += o.g.ClusterSize {
				fn(guest, l1At, l1At, format.L2Entry{})
			}
			continue
		}
		t := o.g.NewTable()
		must(o.t, format.ReadPadded(f, t.B, format.HostOffset(off)))
		size := int64(len(t.B)) / t.Len()
		for j := range t.Len() {
			fn(int64(o.g.Guest(i, j)), l1At, off+j*size, t.Entry(j))
		}
	}
}

package fsck

import (
	"bytes"
	"fmt"
	"iter"
	"maps"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// clusterUse is what a host cluster holds.
type clusterUse uint8

const (
	useNothing clusterUse = iota
	useHeader
	useRefcountTable
	useRefcountBlock
	useSnapshotTable
	useBitmapDirectory
	useBitmapTable
	useBitmapData
	useL1
	useSnapshotL1
	useL2         // several L1 tables may share it
	useData       // several L2 tables may share it
	useCompressed // several L2 entries may share it
)

func (u clusterUse) String() string {
	return [...]string{
		"nothing", "the header", "the refcount table", "a refcount block", "the snapshot table", "the bitmap directory",
		"a bitmap table", "bitmap data", "the active L1 table", "a snapshot's L1 table", "an L2 table", "data", "compressed data",
	}[u]
}

// mayShare tells whether a cluster may be referenced for both uses.
func (u clusterUse) mayShare(with clusterUse) bool {
	return u == useL2 && with == useL2 || u >= useData && with >= useData
}

// origin is where a reference comes from: entry index of the table at offset table, or for useSnapshotL1 the
// snapshot table's row.
type origin struct {
	use   clusterUse
	table format.HostOffset
	index int64
}

func (o origin) String() string {
	switch o.use {
	case useRefcountBlock, useBitmapData, useL2, useData, useCompressed:
		return fmt.Sprintf("%s (entry %d of the table at %#x)", o.use, o.index, o.table)
	case useSnapshotL1, useBitmapTable:
		return fmt.Sprintf("%s (number %d)", o.use, o.index)
	}
	return o.use.String()
}

// clusterMap is what is known about an image's host clusters. Those that are counted or referenced take about a byte of
// memory each, more where counts are large.
type clusterMap struct {
	groups map[int64]*clusterGroup
	recent *clusterGroup // the group used last
}

// clusterGroup is what is known about groupClusters consecutive host clusters. Groups in which nothing is counted
// or referenced do not exist.
type clusterGroup struct {
	number int64
	stored tally // counts in the refcount blocks
	refs   tally // references found
	uses   tally
}

const groupClusters = 4096

func newClusterMap() clusterMap { return clusterMap{groups: make(map[int64]*clusterGroup)} }

// group returns the group that cluster lies in, and its index there.
func (m *clusterMap) group(cluster format.Cluster) (*clusterGroup, int64) {
	number, i := int64(cluster/groupClusters), int64(cluster%groupClusters)
	if m.recent == nil || m.recent.number != number {
		m.recent = m.groups[number]
		if m.recent == nil {
			m.recent = &clusterGroup{number: number}
			m.groups[number] = m.recent
		}
	}
	return m.recent, i
}

// inOrder yields the groups from the first cluster on.
func (m *clusterMap) inOrder() iter.Seq[*clusterGroup] {
	return func(yield func(*clusterGroup) bool) {
		for _, number := range slices.Sorted(maps.Keys(m.groups)) {
			if !yield(m.groups[number]) {
				return
			}
		}
	}
}

// at returns the group's cluster with an index.
func (k *clusterGroup) at(i int64) format.Cluster { return format.Cluster(k.number*groupClusters + i) }

func (k *clusterGroup) use(i int64) clusterUse       { return clusterUse(k.uses.get(i)) }
func (k *clusterGroup) setUse(i int64, u clusterUse) { k.uses.set(i, uint64(u)) }

// agree tells whether the first n clusters are counted as often as they are referenced, as far as that is seen at once, and
// then which is the last one that is.
func (k *clusterGroup) agree(n int64) (last int64, yes bool) {
	if k.stored.numbers.Order != k.refs.numbers.Order || !bytes.Equal(k.stored.numbers.B, k.refs.numbers.B) {
		return 0, false
	}
	for last = n - 1; last >= 0 && k.refs.get(last) == 0; last-- {
	}
	return last, true
}

// tally holds a number for each cluster of a group, in as many bits as the largest needs. The zero value is all 0.
type tally struct{ numbers format.Counts }

func (t *tally) get(i int64) uint64 {
	if t.numbers.None() {
		return 0
	}
	return t.numbers.Get(i)
}

func (t *tally) set(i int64, v uint64) { t.fill(i, 1, v) }

// fill sets n numbers from i on.
func (t *tally) fill(i, n int64, v uint64) {
	if t.numbers.None() && v == 0 {
		return
	}
	t.fit(v)
	t.numbers.Fill(i, n, v)
}

// alike returns the first of n indexes from i on whose number is not v, or i+n.
func (t *tally) alike(i, n int64, v uint64) int64 {
	switch {
	case !t.numbers.None() && v <= t.numbers.Max():
		return t.numbers.Alike(i, n, v)
	case v == 0:
		return i + n
	}
	return i
}

// runs calls fn for the maximal runs of the same number among n from i on.
func (t *tally) runs(i, n int64, fn func(i, n int64, v uint64)) {
	for end := i + n; i < end; {
		v := t.get(i)
		next := t.alike(i, end-i, v)
		fn(i, next-i, v)
		i = next
	}
}

// fit gives each number at least as many bits as v needs, 2 at first.
func (t *tally) fit(v uint64) {
	wide := format.Counts{Order: 1}
	if !t.numbers.None() {
		wide.Order = t.numbers.Order
	}
	for v > wide.Max() {
		wide.Order++
	}
	if !t.numbers.None() && wide.Order == t.numbers.Order {
		return
	}
	wide.B = make([]byte, groupClusters<<wide.Order>>3)
	t.runs(0, groupClusters, wide.Fill)
	t.numbers = wide
}

package qcow2

import (
	"fmt"
	"math"
	"math/bits"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// metadataMap knows which host clusters hold metadata, so that nothing else is ever put there. In a sound image the
// counts and the COPIED flags see to that; in one that was made to do harm they may say that the L1 table is a guest's
// data, or free. It is filled when an image is opened for writing, grows with each table that is written, and forgets
// clusters that become free. What it takes is bounded, see limit and maxScan, whatever the image claims.
type metadataMap struct {
	limit int // L2 tables are not noted beyond it

	mu     lock.RWMutex[lock.Metadata] // guards all below; no other lock is taken while it is held
	groups map[int64]kindGroup
	noted  int // clusters in groups
}

// kindGroup is the kinds of kindGroupClusters neighbouring host clusters: the lower bits of all, and the higher ones. Most
// groups that are asked about do not exist, which makes a question about a long run cheap.
type kindGroup struct{ low, high uint64 }

const kindGroupClusters = 64

// kindGroupOf returns the number of the group that c is in.
func kindGroupOf(c format.Cluster) int64 { return int64(c / kindGroupClusters) }

func (g kindGroup) kind(c format.Cluster) metadataKind {
	i := uint(c) % kindGroupClusters
	return metadataKind(g.low>>i&1 | g.high>>i&1<<1)
}

// kindGroups calls fn for each group that r touches, until it returns false, with the group's number and the clusters of
// r in it as a mask.
func kindGroups(r format.Run, fn func(group int64, mask uint64) bool) {
	for c := r.First; c < r.End(); {
		end := min((c/kindGroupClusters+1)*kindGroupClusters, r.End())
		mask := uint64(math.MaxUint64) >> (kindGroupClusters - uint(end-c)) << (uint(c) % kindGroupClusters)
		if !fn(kindGroupOf(c), mask) {
			return
		}
		c = end
	}
}

// metadataKind is what a host cluster holds. L2 tables may be shared, nothing else may.
type metadataKind uint8

const (
	metadataSole  metadataKind = iota + 1 // header, L1 table, refcount table or block, snapshot table
	metadataL2                            // an L2 table
	metadataOwnL2                         // an L2 table that the active L1 table says it shares with nobody
)

func (k metadataKind) String() string {
	if k == metadataSole {
		return "metadata"
	}
	return "an L2 table"
}

const (
	// maxScan bounds what is read of snapshots' L1 tables when an image is opened, in bytes: enough for hundreds of
	// snapshots of a 16 TiB disk. L2 tables beyond it are not noted.
	maxScan = 64 << 20
	// tableNoteBytes is about what it takes to note an L2 table.
	tableNoteBytes = 32
)

func newMetadataMap(bytes int64) *metadataMap {
	return &metadataMap{limit: int(bytes / tableNoteBytes), groups: make(map[int64]kindGroup)}
}

// add notes what r holds from now on. ErrCorrupt if it is something else already that cannot be the same.
func (m *metadataMap) add(r format.Run, kind metadataKind) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := r.First; c < r.End(); c++ {
		switch have := m.groups[kindGroupOf(c)].kind(c); {
		case have == 0:
			m.set(c, kind)
		case have != metadataL2 || kind != metadataL2:
			return fmt.Errorf("%w: cluster %d is %s and %s", ErrCorrupt, c, have, kind)
		}
	}
	return nil
}

// put notes what is written to clusters that were taken for it, again and again perhaps.
func (m *metadataMap) put(r format.Run, kind metadataKind) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := r.First; c < r.End(); c++ {
		m.set(c, kind)
	}
}

// set notes one cluster. Called with mu held.
func (m *metadataMap) set(c format.Cluster, kind metadataKind) {
	g := m.groups[kindGroupOf(c)]
	if g.kind(c) == 0 {
		if kind != metadataSole && m.noted >= m.limit {
			return
		}
		m.noted++
	}
	bit := uint64(1) << (uint(c) % kindGroupClusters)
	if g.low &^= bit; kind&1 != 0 {
		g.low |= bit
	}
	if g.high &^= bit; kind&2 != 0 {
		g.high |= bit
	}
	m.groups[kindGroupOf(c)] = g
}

// remove forgets clusters that are free.
func (m *metadataMap) remove(r format.Run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	kindGroups(r, func(group int64, mask uint64) bool {
		g, ok := m.groups[group]
		if !ok {
			return true
		}
		m.noted -= bits.OnesCount64((g.low | g.high) & mask)
		if g.low, g.high = g.low&^mask, g.high&^mask; g == (kindGroup{}) {
			delete(m.groups, group)
		} else {
			m.groups[group] = g
		}
		return true
	})
}

// kind returns what is known about a cluster, 0 if nothing.
func (m *metadataMap) kind(c format.Cluster) metadataKind {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.groups[kindGroupOf(c)].kind(c)
}

// refuse returns ErrCorrupt if one of the clusters, which are to hold data or something new, is metadata.
func (m *metadataMap) refuse(r format.Run) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var err error
	kindGroups(r, func(group int64, mask uint64) bool {
		g := m.groups[group]
		if used := (g.low | g.high) & mask; used != 0 {
			c := format.Cluster(group*kindGroupClusters + int64(bits.TrailingZeros64(used)))
			err = fmt.Errorf("%w: cluster %d is %s and in use for something else", ErrCorrupt, c, g.kind(c))
		}
		return err == nil
	})
	return err
}

package format

import (
	"encoding/binary"
	"fmt"
)

// This file walks L2 tables in bulk (C4): runs of entries that map neighbouring host clusters are found by comparing
// words, everything else is decoded entry by entry.

// EntryRun is entries of an L2 table that reference neighbouring host clusters: k entries from index i on, one cluster
// each, or a single compressed one that may touch several.
type EntryRun struct {
	First, k int64
	Hosts    Run
	Copied   bool // of all of them
	Packed   bool // compressed
}

// EntryRuns checks the entries of a table and appends the maximal runs of those that reference host clusters.
func (t L2Table) EntryRuns(g Geometry, version int, rs []EntryRun) ([]EntryRun, error) {
	stride := t.EntrySize()
	size := uint64(g.ClusterSize)
	for at := int64(0); at < int64(len(t.B)); {
		w := binary.BigEndian.Uint64(t.B[at:])
		if w == 0 && (!t.Extended || binary.BigEndian.Uint64(t.B[at+8:]) == 0) {
			at += stride
			continue
		}
		i := at / stride
		if w&^(FlagCopied|OffsetMask&^(size-1)) != 0 || w&OffsetMask == 0 {
			e := t.Entry(i)
			if err := e.Check(g, version); err != nil {
				return rs, fmt.Errorf("entry %d: %w", i, err)
			}
			if hosts := e.HostClusters(g); hosts.N > 0 {
				rs = append(rs, EntryRun{i, 1, hosts, e.Copied(), e.Kind() == KindCompressed})
			}
			at += stride
			continue
		}
		k, err := t.Follow(at, w, size)
		if err != nil {
			return rs, err
		}
		rs = append(rs, EntryRun{i, k, Run{g.Cluster(HostOffset(w & OffsetMask)), k}, w&FlagCopied != 0, false})
		at += k * stride
	}
	return rs, nil
}

// Follow returns how many entries from byte at on, whose first word is w, map neighbouring host clusters with the same
// flags.
func (t L2Table) Follow(at int64, w, size uint64) (int64, error) {
	if t.Extended {
		return t.followExtended(at, w, size)
	}
	k := int64(1)
	for b := t.B[at+8:]; len(b) >= 8; b = b[8:] {
		if w += size; binary.BigEndian.Uint64(b) != w {
			break
		}
		k++
	}
	return k, nil
}

func (t L2Table) followExtended(at int64, w, size uint64) (int64, error) {
	k := int64(0)
	for ; at < int64(len(t.B)) && binary.BigEndian.Uint64(t.B[at:]) == w; at += 16 {
		if sub := binary.BigEndian.Uint64(t.B[at+8:]); sub&(sub>>Subclusters) != 0 {
			return k, fmt.Errorf("entry %d: %w: subclusters are allocated and zero at once: %#x", at/16, ErrCorrupt, sub)
		}
		w += size
		k++
	}
	return k, nil
}

// SetCopied sets or clears COPIED in n entries from index i on.
func (t L2Table) SetCopied(i, n int64, copied bool) {
	stride := t.EntrySize()
	for at := i * stride; at < (i+n)*stride; at += stride {
		if t.B[at] &^= FlagCopied >> 56; copied {
			t.B[at] |= FlagCopied >> 56
		}
	}
}

// ClearCopied clears COPIED in all entries. It tells whether one had it.
func (t L2Table) ClearCopied() bool {
	var seen byte
	for at := 0; at < len(t.B); at += int(t.EntrySize()) { // the flag is the highest bit of the first byte
		seen |= t.B[at]
		t.B[at] &^= FlagCopied >> 56
	}
	return seen&(FlagCopied>>56) != 0
}

// Zeros tells whether entries first to last are sound and read as zeros.
func (t L2Table) Zeros(g Geometry, version int, first, last int64) bool {
	for i := first; i <= last; i++ {
		if e := t.Entry(i); !e.Kind().ReadsZero() || e.Check(g, version) != nil {
			return false
		}
	}
	return true
}

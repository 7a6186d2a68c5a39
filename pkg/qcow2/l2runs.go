package qcow2

import (
	"encoding/binary"
	"fmt"
)

// This file walks L2 tables in bulk (C4): runs of entries that map neighbouring host clusters are found by comparing
// words, everything else is decoded entry by entry.

// entryRun is entries of an L2 table that reference neighbouring host clusters: k entries from index i on, one cluster
// each, or a single compressed one that may touch several.
type entryRun struct {
	i, k   int64
	hosts  run
	copied bool // of all of them
	packed bool // compressed
}

// entryRuns checks the entries of a table and appends the maximal runs of those that reference host clusters.
func (t table) entryRuns(g geometry, version int, rs []entryRun) ([]entryRun, error) {
	stride := t.entrySize()
	size := uint64(g.clusterSize)
	for at := int64(0); at < int64(len(t.b)); {
		w := binary.BigEndian.Uint64(t.b[at:])
		if w == 0 && (!t.extended || binary.BigEndian.Uint64(t.b[at+8:]) == 0) {
			at += stride
			continue
		}
		i := at / stride
		if w&^(flagCopied|offsetMask&^(size-1)) != 0 || w&offsetMask == 0 {
			e := t.entry(i)
			if err := e.check(g, version); err != nil {
				return rs, fmt.Errorf("entry %d: %w", i, err)
			}
			if first, n := e.hostClusters(g); n > 0 {
				rs = append(rs, entryRun{i, 1, run{first, n}, e.copied(), e.kind() == kindCompressed})
			}
			at += stride
			continue
		}
		k, err := t.follow(at, w, size)
		if err != nil {
			return rs, err
		}
		rs = append(rs, entryRun{i, k, run{int64(w&offsetMask) >> g.clusterBits, k}, w&flagCopied != 0, false})
		at += k * stride
	}
	return rs, nil
}

// follow returns how many entries from byte at on, whose first word is w, map neighbouring host clusters with the same
// flags.
func (t table) follow(at int64, w, size uint64) (int64, error) {
	if t.extended {
		return t.followExtended(at, w, size)
	}
	k := int64(1)
	for b := t.b[at+8:]; len(b) >= 8; b = b[8:] {
		if w += size; binary.BigEndian.Uint64(b) != w {
			break
		}
		k++
	}
	return k, nil
}

func (t table) followExtended(at int64, w, size uint64) (int64, error) {
	k := int64(0)
	for ; at < int64(len(t.b)) && binary.BigEndian.Uint64(t.b[at:]) == w; at += 16 {
		if sub := binary.BigEndian.Uint64(t.b[at+8:]); sub&(sub>>subclusters) != 0 {
			return k, fmt.Errorf("entry %d: %w: subclusters are allocated and zero at once: %#x", at/16, ErrCorrupt, sub)
		}
		w += size
		k++
	}
	return k, nil
}

// setCopied sets or clears COPIED in n entries from index i on.
func (t table) setCopied(i, n int64, copied bool) {
	stride := t.entrySize()
	for at := i * stride; at < (i+n)*stride; at += stride {
		if t.b[at] &^= flagCopied >> 56; copied {
			t.b[at] |= flagCopied >> 56
		}
	}
}

// clearCopied clears COPIED in all entries. It tells whether one had it.
func (t table) clearCopied() bool {
	var seen byte
	for at := 0; at < len(t.b); at += int(t.entrySize()) { // the flag is the highest bit of the first byte
		seen |= t.b[at]
		t.b[at] &^= flagCopied >> 56
	}
	return seen&(flagCopied>>56) != 0
}

// zeros tells whether entries first to last are sound and read as zeros.
func (t table) zeros(g geometry, version int, first, last int64) bool {
	for i := first; i <= last; i++ {
		if e := t.entry(i); !e.kind().readsZero() || e.check(g, version) != nil {
			return false
		}
	}
	return true
}

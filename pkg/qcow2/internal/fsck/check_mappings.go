package fsck

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// l1Region is an L1 table on disk.
type l1Region struct {
	offset  format.HostOffset
	entries int64
	from    origin
}

// l2Region is an L2 table on disk and how many L1 entries, of the active table and of all, point at it.
type l2Region struct {
	offset        format.HostOffset
	active, times int64
}

// markL1Tables drops those that cannot be walked.
func (c *checker) markL1Tables() error {
	c.l1 = slices.DeleteFunc(c.l1, func(l l1Region) bool {
		return l.entries == 0 || !c.reference(l.from, l.offset, l.entries*8, 1)
	})
	return nil
}

// walkL1Tables finds the L2 tables and how often each is referenced.
func (c *checker) walkL1Tables() error {
	isActive := func(l l1Region) bool { return l.from.use == useL1 }
	for _, active := range []bool{true, false} {
		for _, l1 := range c.l1 {
			if isActive(l1) != active {
				continue
			}
			err := c.scan(l1.offset, l1.entries*8, func(b []byte, at int64) error {
				for i := 0; i < len(b); i += 8 {
					if e := format.L1Entry(binary.BigEndian.Uint64(b[i:])); e != 0 {
						c.checkL1Entry(e, origin{use: useL2, table: l1.offset, index: (at + int64(i)) / 8}, active)
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		for i := range c.l2 {
			k, at := c.group(c.g.Cluster(c.l2[i].offset))
			c.l2[i].times = int64(k.refs.get(at))
			if active {
				c.l2[i].active = c.l2[i].times
			}
		}
	}
	return nil
}

func (c *checker) checkL1Entry(e format.L1Entry, from origin, active bool) {
	if e&format.L1Reserved != 0 {
		c.corrupt(1, "%s: reserved bits are set in %#x", from, uint64(e))
	}
	off := e.Offset()
	switch {
	case off == 0:
		c.corrupt(1, "%s: offset 0, in the header", from)
		return
	case !c.g.Aligned(off):
		c.corrupt(1, "%s: offset %#x is not aligned to a cluster", from, off)
		return
	case active:
		c.checkCopied(from, off, e.Copied(), 1)
	}
	known := false
	if c.g.Cluster(off) < c.end {
		k, i := c.group(c.g.Cluster(off))
		known = k.use(i) == useL2
	}
	if c.reference(from, off, c.g.ClusterSize, 1) && !known {
		c.l2 = append(c.l2, l2Region{offset: off})
	}
}

// checkCopied holds the COPIED flag of an active entry against the stored count (I2). The harm that a wrong one may do is undone
// by clearCopied, or is that of a count that is too low.
func (c *checker) checkCopied(from origin, off format.HostOffset, copied bool, times int64) {
	stored := c.stored(off)
	if copied == (stored == 1) {
		return
	}
	c.blemish(times, "%s: COPIED is %t, but the cluster at %#x has refcount %d", from, copied, off, stored)
	switch {
	case !copied:
	case from.use == useL2:
		c.miscopied[from.table] = c.h.L1Size * 8
	default:
		c.miscopied[from.table] = c.g.ClusterSize
	}
}

// walkL2Tables checks what the L2 tables hold.
func (c *checker) walkL2Tables() error {
	slices.SortFunc(c.l2, func(a, b l2Region) int { return cmp.Compare(a.offset, b.offset) })
	return c.eachL2Table(c.l2, func(t format.L2Table, l2 l2Region) error {
		c.checkL2Table(t, l2)
		return nil
	})
}

// eachL2Table calls fn for each table and its content, which fn may change. Tables that lie side by side are read in
// one go.
func (c *checker) eachL2Table(all []l2Region, fn func(t format.L2Table, l2 l2Region) error) error {
	size := c.g.ClusterSize
	total := int64(len(all)) * size
	done := int64(0)
	for rest := all; len(rest) > 0; {
		n := 1
		for n < len(rest) && rest[n].offset == rest[n-1].offset.Plus(size) && int64(n+1)*size <= readBytes {
			n++
		}
		err := c.scan(rest[0].offset, int64(n)*size, func(b []byte, at int64) error {
			for ; len(b) > 0; b, at = b[size:], at+size {
				if err := fn(c.g.Table(b[:size]), rest[at/size]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		rest = rest[n:]
		done += int64(n) * size
		c.progress(done, total)
	}
	return nil
}

func (c *checker) checkL2Table(t format.L2Table, l2 l2Region) {
	for i := int64(0); i < t.Len(); i++ {
		e := t.Entry(i)
		if e == (format.L2Entry{}) {
			continue
		}
		from := origin{use: useData, table: l2.offset, index: i}
		if e.Kind() == format.KindCompressed {
			c.checkCompressed(e, from, l2)
			continue
		}
		if e.Desc&(format.L2Reserved|format.FlagZero) != 0 {
			c.corrupt(l2.times, "%s: reserved bits are set in %#x", from, e.Desc)
		}
		if e.Sub&format.SubZero != 0 && c.h.Version < 3 {
			c.corrupt(l2.times, "%s: zero flag in %#x of a version 2 image", from, e.Desc)
		}
		if e.Sub&format.SubAllocated&(e.Sub>>format.Subclusters) != 0 || e.Sub&format.SubAllocated != 0 && e.Offset() == 0 {
			c.corrupt(l2.times, "%s: impossible subclusters %#x", from, uint64(e.Sub))
		}
		off := e.Offset()
		switch {
		case off == 0: // unallocated or plain zero
		case !c.g.Aligned(off):
			c.corrupt(l2.times, "%s: offset %#x is not aligned to a cluster", from, off)
		default:
			n := c.dataRun(t, i)
			c.reference(from, off, c.g.Bytes(n), l2.times)
			c.result.Allocated += n * l2.active
			if l2.active > 0 {
				c.checkCopiedRun(from, off, n, e.Copied(), l2.active)
			}
			i += n - 1
		}
	}
}

// dataRun returns how many entries from i on, which has an aligned host cluster, map consecutive clusters with the same
// COPIED flag. It stops before one that needs a look of its own, and at the end of the file.
func (c *checker) dataRun(t format.L2Table, i int64) int64 {
	first := t.Entry(i)
	most := max(1, int64(c.g.Cluster(c.length)-c.g.Cluster(first.Offset())))
	if plain := first.Desc&^(format.FlagCopied|format.OffsetMask) == 0 && first.Sub&format.SubZero == 0; plain && !t.Extended {
		n, _ := t.Follow(i*t.EntrySize(), first.Desc, uint64(c.g.ClusterSize))
		return min(n, most)
	}
	n := int64(1)
	for ; i+n < t.Len() && n < most; n++ {
		e := t.Entry(i + n)
		if e.Desc&(format.FlagCompressed|format.L2Reserved|format.FlagZero) != 0 || e.Offset() != first.Offset().Plus(c.g.Bytes(n)) ||
			e.Copied() != first.Copied() || e.Sub&format.SubZero != 0 && (c.h.Version < 3 || c.g.Extended) {
			break
		}
	}
	return n
}

// checkCopiedRun is checkCopied for n clusters from off on, which consecutive entries map, the first of which is from.
func (c *checker) checkCopiedRun(from origin, off format.HostOffset, n int64, copied bool, times int64) {
	for done := int64(0); done < n; {
		cluster := c.g.Cluster(off) + format.Cluster(done)
		if cluster >= c.end {
			c.checkCopied(from, off, copied, times)
			return
		}
		k, i := c.group(cluster)
		m := min(n-done, groupClusters-i)
		k.stored.runs(i, m, func(j, m int64, v uint64) {
			if copied == (v == 1) {
				return
			}
			for ; m > 0; j, m = j+1, m-1 {
				at := done + j - i
				c.checkCopied(origin{from.use, from.table, from.index + at}, off.Plus(c.g.Bytes(at)), copied, times)
			}
		})
		done += m
	}
}

func (c *checker) checkCompressed(e format.L2Entry, from origin, l2 l2Region) {
	from.use = useCompressed
	if e.Copied() {
		c.corrupt(l2.times, "%s: COPIED is set on a compressed cluster, %#x", from, e.Desc)
	}
	if e.Sub != 0 {
		c.corrupt(l2.times, "%s: a compressed cluster has subclusters, %#x", from, uint64(e.Sub))
	}
	off, n := e.Compressed(c.g)
	c.reference(from, off, n, l2.times)
	c.result.Allocated += l2.active
}

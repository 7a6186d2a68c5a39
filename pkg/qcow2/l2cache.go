package qcow2

import (
	"container/list"
	"math/bits"
)

// l2Table is an L2 table of the active state in memory.
type l2Table struct {
	index   int64 // in the L1 table
	offset  int64 // host offset of the table
	data    table
	dirty   sectorSet // changed since the last commit took them
	writing sectorSet // taken by a commit that has not finished
}

// set changes an entry and marks its sector.
func (t *l2Table) set(i int64, e l2Entry) {
	t.data.set(i, e)
	t.dirty.add(i * t.data.entrySize() / sectorSize)
}

func (t *l2Table) clean() bool { return t.dirty.empty() && t.writing.empty() }

// l2Cache keeps the most recently used L2 tables, and all dirty ones. The zero value is not usable. Its owner
// guards it.
type l2Cache struct {
	limit  int // tables
	tables map[int64]*list.Element
	recent *list.List // of *l2Table, most recently used first
	spare  []byte     // memory of a table that was dropped
}

// newTable returns a table to be read.
func (c *l2Cache) newTable(g geometry) table {
	b := c.spare
	if c.spare = nil; b == nil {
		return g.newTable()
	}
	return g.table(b)
}

func newL2Cache(bytes int64, g geometry) *l2Cache {
	return &l2Cache{
		limit:  int(max(bytes>>g.clusterBits, 4)),
		tables: make(map[int64]*list.Element),
		recent: list.New(),
	}
}

func (c *l2Cache) get(index int64) *l2Table {
	e := c.tables[index]
	if e == nil {
		return nil
	}
	c.recent.MoveToFront(e)
	return e.Value.(*l2Table)
}

// peek is get for who does not use the table as a guest does.
func (c *l2Cache) peek(index int64) *l2Table {
	if e := c.tables[index]; e != nil {
		return e.Value.(*l2Table)
	}
	return nil
}

// put adds or replaces a table and drops the least recently used clean ones beyond the limit.
func (c *l2Cache) put(t *l2Table) {
	c.drop(t.index)
	c.tables[t.index] = c.recent.PushFront(t)
	for e := c.recent.Back(); e != nil && c.recent.Len() > c.limit; {
		old := e.Value.(*l2Table)
		e = e.Prev()
		if old.clean() && old != t {
			c.drop(old.index)
			c.spare = old.data.b
		}
	}
}

// dropClean drops all tables but the dirty ones.
func (c *l2Cache) dropClean() {
	for index, e := range c.tables {
		if e.Value.(*l2Table).clean() {
			c.drop(index)
		}
	}
	c.spare = nil
}

func (c *l2Cache) drop(index int64) {
	if e := c.tables[index]; e != nil {
		c.recent.Remove(e)
		delete(c.tables, index)
	}
}

func (c *l2Cache) clear() {
	clear(c.tables)
	c.recent.Init()
}

// sectorSet is a set of the sectors of a table.
type sectorSet []uint64

func (s *sectorSet) add(i int64) {
	for int64(len(*s)) <= i/64 {
		*s = append(*s, 0)
	}
	(*s)[i/64] |= 1 << (i % 64)
}

// addRange adds the sectors that bytes [from, to) touch.
func (s *sectorSet) addRange(from, to int64) {
	for i := from / sectorSize; i*sectorSize < to; i++ {
		s.add(i)
	}
}

// allSectors is the set of all sectors of a table.
func (g geometry) allSectors() sectorSet {
	var s sectorSet
	s.addRange(0, g.clusterSize)
	return s
}

func (s *sectorSet) addAll(o sectorSet) {
	for w, b := range o {
		for ; b != 0; b &= b - 1 {
			s.add(int64(w*64 + bits.TrailingZeros64(b)))
		}
	}
}

func (s sectorSet) has(i int64) bool {
	return i/64 < int64(len(s)) && s[i/64]&(1<<(i%64)) != 0
}

func (s sectorSet) empty() bool {
	for _, b := range s {
		if b != 0 {
			return false
		}
	}
	return true
}

// each calls fn for each maximal run of neighbours in the set.
func (s sectorSet) each(fn func(first, n int64)) {
	end := int64(len(s)) * 64
	for i := int64(0); i < end; {
		if !s.has(i) {
			i++
			continue
		}
		first := i
		for i < end && s.has(i) {
			i++
		}
		fn(first, i-first)
	}
}

// parts returns copies of the sectors in the set of b, which lies at off.
func (s sectorSet) parts(b []byte, off int64) []metaWrite {
	var ps []metaWrite
	s.each(func(first, n int64) {
		at, end := first*sectorSize, min((first+n)*sectorSize, int64(len(b)))
		ps = append(ps, metaWrite{off + at, append([]byte(nil), b[at:end]...)})
	})
	return ps
}

package qcow2

import (
	"container/list"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// l2Table is an L2 table of the active state in memory.
type l2Table struct {
	index   int64 // in the L1 table
	offset  format.HostOffset
	data    format.L2Table
	dirty   format.SectorSet // changed since the last commit took them
	writing format.SectorSet // taken by a commit that has not finished
}

// set changes an entry and marks its sector.
func (t *l2Table) set(i int64, e format.L2Entry) {
	t.data.Set(i, e)
	t.dirty.Add(i * t.data.EntrySize() / format.SectorSize)
}

func (t *l2Table) clean() bool { return t.dirty.Empty() && t.writing.Empty() }

// l2Cache keeps the most recently used L2 tables, and all dirty ones. The zero value is not usable. Its owner
// guards it. With a limit of 3, the most recently used first and a dirty one with a star:
//
//	        7 5* 2
//	put 9   9 7 5*      2 was the last, and is dropped
//	put 4   4 9 5*      5 is dirty, so 7 is dropped
//	get 5   5* 4 9
//	put 8   8 5* 4      9 is dropped
//
// If all are dirty there are more than the limit, until a commit; relieve sees to it that one comes.
type l2Cache struct {
	limit  int // tables
	tables map[int64]*list.Element
	recent *list.List // of *l2Table, most recently used first
	spare  []byte     // memory of a table that was dropped
}

// newTable returns a table to be read.
func (c *l2Cache) newTable(g format.Geometry) format.L2Table {
	b := c.spare
	if c.spare = nil; b == nil {
		return g.NewTable()
	}
	return g.Table(b)
}

func newL2Cache(bytes int64, g format.Geometry) *l2Cache {
	return &l2Cache{
		limit:  int(max(bytes/g.ClusterSize, 4)),
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
			c.spare = old.data.B
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

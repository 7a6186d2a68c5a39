package qcow2

import "fmt"

// ExtentKind says what an extent is made of.
type ExtentKind int

// The kinds of extents.
const (
	Unallocated ExtentKind = iota // reads as zeros
	Zero                          // reads as zeros and is marked so; it may keep host clusters
	Data
	Compressed
)

// String returns the kind's name in lower case.
func (k ExtentKind) String() string {
	return [...]string{"unallocated", "zero", "data", "compressed"}[k]
}

// Extent is a part of a disk that is stored in one way.
type Extent struct {
	Offset, Length int64 // guest bytes
	Kind           ExtentKind
	Host           int64 // file offset of the data; -1 if there is none
}

// Extents calls fn for each extent from off to the end of the disk, in order, joined as far as possible. It ends
// early with fn's error.
func (v *View) Extents(off int64, fn func(Extent) error) error {
	if off < 0 || off > v.Size() {
		return fmt.Errorf("%s: %w: offset %d of a disk of %d", v.img.f.Name(), ErrOutOfRange, off, v.Size())
	}
	g := v.img.g
	var cur Extent
	emit := func(e Extent) error {
		if cur.Length > 0 && cur.joins(e) {
			cur.Length += e.Length
			return nil
		}
		last := cur
		cur = e
		if last.Length == 0 {
			return nil
		}
		return fn(last)
	}
	size := v.Size()
	for off < size {
		c := chunk{off: off, n: min(size-off, g.l2Coverage-off%g.l2Coverage), table: g.l1Index(off), first: g.l2Index(off)}
		c.last = g.l2Index(off + c.n - 1)
		es, err := v.entries(c)
		if err != nil {
			return err
		}
		for _, e := range es {
			n := min(g.clusterSize-g.inCluster(off), size-off)
			if err := emit(newExtent(g, e, off, n)); err != nil {
				return err
			}
			off += n
		}
	}
	if cur.Length == 0 {
		return nil
	}
	return fn(cur)
}

func newExtent(g geometry, e l2Entry, off, n int64) Extent {
	x := Extent{Offset: off, Length: n, Host: -1}
	switch e.kind() {
	case kindUnallocated:
	case kindZero:
		x.Kind = Zero
	case kindZeroAlloc:
		x.Kind, x.Host = Zero, e.offset()+g.inCluster(off)
	case kindData:
		x.Kind, x.Host = Data, e.offset()+g.inCluster(off)
	case kindCompressed:
		x.Kind = Compressed
		x.Host, _ = e.compressed(g)
	}
	return x
}

// joins tells whether e, which comes right after x, goes on with it.
func (x Extent) joins(e Extent) bool {
	switch {
	case x.Kind != e.Kind || x.Kind == Compressed:
		return false
	case x.Host < 0:
		return e.Host < 0
	}
	return e.Host == x.Host+x.Length
}

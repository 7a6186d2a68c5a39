package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

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
	end := format.GuestOffset(v.Size())
	for at := format.GuestOffset(off); at < end; {
		c := g.Chunk(at, min(int64(end-at), g.UpToTable(at)))
		es, err := v.mappedEntries(c)
		if err != nil {
			return err
		}
		if es == nil {
			if err := emit(Extent{Offset: int64(at), Length: c.N, Host: -1}); err != nil {
				return err
			}
			at = c.End()
			continue
		}
		for _, e := range es {
			for left := min(g.ClusterSize-g.InCluster(at), int64(end-at)); left > 0; {
				x := newExtent(g, e, at, left)
				if err := emit(x); err != nil {
					return err
				}
				at, left = at.Plus(x.Length), left-x.Length
			}
		}
	}
	if cur.Length == 0 {
		return nil
	}
	return fn(cur)
}

// newExtent describes n bytes at off of the cluster that e maps, or as many of them as are alike.
func newExtent(g format.Geometry, e format.L2Entry, off format.GuestOffset, n int64) Extent {
	x := Extent{Offset: int64(off), Length: n, Host: -1}
	if e.Kind() != format.KindCompressed && e.Offset() != 0 {
		x.Host = int64(e.Offset()) + g.InCluster(off)
	}
	switch e.Kind() {
	case format.KindUnallocated:
	case format.KindZero, format.KindZeroAlloc:
		x.Kind = Zero
	case format.KindData:
		x.Kind = Data
	case format.KindCompressed:
		x.Kind = Compressed
		host, _ := e.Compressed(g)
		x.Host = int64(host)
	case format.KindMixed:
		part, allocated := e.SubRun(g, g.InCluster(off))
		x.Length = min(n, part)
		if x.Kind = Zero; allocated {
			x.Kind = Data
		}
	}
	return x
}

// joins tells whether e, which comes right after x, goes on with it.
func (x Extent) joins(e Extent) bool {
	switch {
	case x.Kind != e.Kind || x.Kind >= Compressed:
		return false
	case x.Host < 0:
		return e.Host < 0
	}
	return e.Host == x.Host+x.Length
}

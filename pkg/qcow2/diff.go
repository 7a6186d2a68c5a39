package qcow2

import (
	"context"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Change is a part of the disk that is not stored as it was.
type Change struct {
	Offset, Length int64 // guest bytes
	Zero           bool  // it reads as zeros now, and did not; else it has data that was written since, perhaps the same again
}

// Diff calls fn for each part of v's disk that has changed since from, a view of the same image, in order, joined as far as
// possible. All else reads the same in both; what lies behind from's end counts as zeros. Data is not read, and L2
// tables that both have are not either. Of an active disk in use it tells each part as it is when it gets there. It ends
// early with fn's error, or with ctx.
func (v *View) Diff(ctx context.Context, from *View, fn func(Change) error) error {
	if v.img != from.img {
		return fmt.Errorf("%w: a comparison of %s with %s", ErrUnsupported, v.img.f.Name(), from.img.f.Name())
	}
	d := differ{g: v.img.g, fn: fn}
	g, end := v.img.g, format.GuestOffset(v.Size())
	for at := format.GuestOffset(0); at < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		c := g.Chunk(at, min(int64(end-at), g.UpToTable(at)))
		at = c.End()
		if v.tableAt(c.Table) == from.tableAt(c.Table) {
			continue
		}
		now, err := v.mappedEntries(c)
		if err != nil {
			return err
		}
		before, err := from.mappedEntriesWithin(c)
		if err != nil {
			return err
		}
		if err := d.compare(c, before, now); err != nil {
			return err
		}
	}
	return d.end()
}

// tableAt returns where an L2 table is in the file, 0 if there is none.
func (v *View) tableAt(index int64) format.HostOffset {
	l1 := v.l1
	if v.row == nil {
		v.img.mu.Lock()
		defer v.img.mu.Unlock()
		l1 = v.img.l1
	}
	if index >= int64(len(l1)) {
		return 0
	}
	return l1[index].Offset()
}

// mappedEntriesWithin is mappedEntries of as much of c as lies on v's disk.
func (v *View) mappedEntriesWithin(c format.Chunk) ([]format.L2Entry, error) {
	n := min(c.N, v.Size()-int64(c.Off))
	if n <= 0 {
		return nil, nil
	}
	return v.mappedEntries(v.img.g.Chunk(c.Off, n))
}

// differ joins changes.
type differ struct {
	g   format.Geometry
	fn  func(Change) error
	cur Change
}

// compare compares the entries of a chunk, of which before and now may have fewer, or none: then the rest is unallocated.
func (d *differ) compare(c format.Chunk, before, now []format.L2Entry) error {
	entry := func(es []format.L2Entry, i int) (e format.L2Entry) {
		if i < len(es) {
			e = es[i]
		}
		return e
	}
	at := c.Off
	for i := 0; at < c.End(); i++ {
		for left := min(d.g.ClusterSize-d.g.InCluster(at), int64(c.End()-at)); left > 0; {
			a, b := newExtent(d.g, entry(before, i), at, left), newExtent(d.g, entry(now, i), at, left)
			n := min(a.Length, b.Length)
			same := a.Kind == b.Kind && a.Host == b.Host || a.Kind <= Zero && b.Kind <= Zero
			if !same {
				if err := d.add(Change{int64(at), n, b.Kind <= Zero}); err != nil {
					return err
				}
			}
			at, left = at.Plus(n), left-n
		}
	}
	return nil
}

func (d *differ) add(c Change) error {
	if d.cur.Length > 0 && d.cur.Offset+d.cur.Length == c.Offset && d.cur.Zero == c.Zero {
		d.cur.Length += c.Length
		return nil
	}
	err := d.end()
	d.cur = c
	return err
}

// end tells the last change.
func (d *differ) end() error {
	if d.cur.Length == 0 {
		return nil
	}
	return d.fn(d.cur)
}

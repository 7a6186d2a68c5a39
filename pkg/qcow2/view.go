package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// View reads one state of an image: the active one, or a snapshot. A snapshot's view does not wait for guest
// requests: what it reads does not change.
type View struct {
	img  *Image
	size int64 // of a snapshot's disk
	row  *format.SnapshotRow
	l1   []format.L1Entry

	mu     lock.Mutex[lock.View] // guards all below
	l2     *l2Cache
	closed bool
}

// viewCacheBytes is what a snapshot's view keeps of L2 tables.
const viewCacheBytes = 1 << 20

// Active returns a view of the active disk, as it is at the time of each call.
func (img *Image) Active() *View { return &View{img: img} }

// OpenSnapshot opens a snapshot for reading, with its own disk size. It cannot be deleted until the view is closed.
func (img *Image) OpenSnapshot(s Selector) (*View, error) {
	if err := img.begin(0, 0, false); err != nil {
		return nil, err
	}
	defer img.end()
	row, err := img.findRow(s)
	if err != nil {
		return nil, err
	}
	l1, err := img.snapshotDiskL1(&row)
	if err != nil {
		return nil, err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.build != nil && img.build.deleting == row.ID {
		return nil, fmt.Errorf("%s: snapshot %q is being deleted: %w", img.f.Name(), row.Name, ErrInUse)
	}
	img.views[row.ID]++
	return &View{img: img, size: row.DiskSize, row: &row, l1: l1, l2: newL2Cache(viewCacheBytes, img.g)}, nil
}

// viewed tells whether a view of a snapshot is open.
func (img *Image) viewed(id string) bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.views[id] > 0
}

// Size returns the size of the disk in bytes.
func (v *View) Size() int64 {
	if v.row == nil {
		return v.img.Size()
	}
	return v.size
}

// Close ends the view. The image stays open.
func (v *View) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return fmt.Errorf("view of %s: %w", v.img.f.Name(), ErrClosed)
	}
	v.closed = true
	if v.row != nil {
		v.img.mu.Lock()
		defer v.img.mu.Unlock()
		v.img.views[v.row.ID]--
	}
	return nil
}

// ReadAt reads len(p) bytes at off, all of them or an error.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if v.row == nil {
		return v.img.ReadAt(p, off)
	}
	if off < 0 || off > v.size || int64(len(p)) > v.size-off {
		return 0, fmt.Errorf("%s, snapshot %q: %w: %d bytes at %d of a disk of %d", v.img.f.Name(), v.row.Name, ErrOutOfRange, len(p), off, v.size)
	}
	done := 0
	err := v.img.g.Chunks(format.GuestOffset(off), int64(len(p)), func(c format.Chunk) error {
		es, err := v.entries(c)
		if err == nil {
			err = v.img.readEntries(p[done:done+int(c.N)], c.Off, es)
		}
		if err == nil {
			done += int(c.N)
		}
		return err
	})
	return done, err
}

// entries returns a copy of the checked entries of c.
func (v *View) entries(c format.Chunk) ([]format.L2Entry, error) {
	es, err := v.mappedEntries(c)
	if es == nil {
		es = make([]format.L2Entry, c.Last-c.First+1)
	}
	return es, err
}

// mappedEntries is entries, or nil if there is no L2 table.
func (v *View) mappedEntries(c format.Chunk) ([]format.L2Entry, error) {
	if v.row == nil {
		if err := v.img.begin(int64(c.Off), c.N, false); err != nil {
			return nil, err
		}
		defer v.img.end()
		return v.img.mappedEntries(c)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil, fmt.Errorf("view of %s: %w", v.img.f.Name(), ErrClosed)
	}
	t, err := v.table(c.Table)
	if err != nil || t.B == nil {
		return nil, err
	}
	es := make([]format.L2Entry, c.Last-c.First+1)
	for i := range es {
		es[i] = t.Entry(c.First + int64(i))
		if err := es[i].Check(v.img.g, v.img.version); err != nil {
			return nil, fmt.Errorf("%s: L2 table %d of snapshot %q, entry %d: %w", v.img.f.Name(), c.Table, v.row.Name, c.First+int64(i), err)
		}
	}
	return es, nil
}

// table returns a snapshot's L2 table, an empty one if there is none. Called with mu held.
func (v *View) table(index int64) (format.L2Table, error) {
	if t := v.l2.get(index); t != nil {
		return t.data, nil
	}
	e := v.l1[index]
	if err := v.img.checkL1Entry(e); err != nil {
		return format.L2Table{}, fmt.Errorf("%s: L1 entry %d of snapshot %q: %w", v.img.f.Name(), index, v.row.Name, err)
	}
	if e.Offset() == 0 {
		return format.L2Table{}, nil
	}
	data, err := format.ReadL2(v.img.f, v.img.g, e.Offset())
	if err != nil {
		return format.L2Table{}, err
	}
	v.l2.put(&l2Table{index: index, offset: e.Offset(), data: data})
	return data, nil
}

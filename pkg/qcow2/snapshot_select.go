package qcow2

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// Snapshot is one row of an image's snapshot table.
type Snapshot struct {
	ID, Name    string
	Date        time.Time     // when it was taken, UTC
	VMClock     time.Duration // guest time since boot; 0 without a VM
	VMStateSize int64         // bytes of VM state stored with it; 0 without a VM
	DiskSize    int64         // virtual bytes at the time of the snapshot
	Icount      uint64        // guest instructions; all ones: unknown
}

// newSnapshot returns what a row of the snapshot table says. Sizes and times beyond what that can hold, which
// are data only, are cut to the largest.
func newSnapshot(r *format.SnapshotRow) Snapshot {
	return Snapshot{
		ID:          r.ID,
		Name:        r.Name,
		Date:        time.Unix(int64(r.DateSec), int64(r.DateNsec)).UTC(),
		VMClock:     time.Duration(min(r.VMClock, math.MaxInt64)),
		VMStateSize: int64(min(r.VMStateSize, math.MaxInt64)),
		DiskSize:    r.DiskSize,
		Icount:      r.Icount,
	}
}

// Selector names a snapshot; make one with ByID, ByName, ByIDAndName or ByIDOrName. Names need not be
// unique in a table that QEMU wrote: the first row in table order is meant.
type Selector struct {
	kind     selectorKind
	id, name string
}

type selectorKind uint8

const (
	selectNothing selectorKind = iota // the zero Selector
	selectID
	selectName
	selectBoth
	selectEither
)

// ByID selects the snapshot with that ID.
func ByID(id string) Selector { return Selector{kind: selectID, id: id} }

// ByName selects the snapshot with that name.
func ByName(name string) Selector { return Selector{kind: selectName, name: name} }

// ByIDAndName selects the snapshot that has both.
func ByIDAndName(id, name string) Selector { return Selector{kind: selectBoth, id: id, name: name} }

// ByIDOrName selects the snapshot with ID s or, if no snapshot has that, with name s, as QEMU does for
// `qemu-img snapshot -a`.
func ByIDOrName(s string) Selector { return Selector{kind: selectEither, id: s, name: s} }

// String says what is selected, for error messages.
func (s Selector) String() string {
	switch s.kind {
	case selectID:
		return fmt.Sprintf("snapshot with id %q", s.id)
	case selectName:
		return fmt.Sprintf("snapshot %q", s.name)
	case selectBoth:
		return fmt.Sprintf("snapshot %q with id %q", s.name, s.id)
	case selectEither:
		return fmt.Sprintf("snapshot with id or name %q", s.id)
	}
	return "snapshot of an empty selector"
}

// findSnapshot returns the index of the row that s selects, or ErrNotFound.
func findSnapshot(rows []format.SnapshotRow, s Selector) (int, error) {
	first := func(match func(*format.SnapshotRow) bool) int {
		for i := range rows {
			if match(&rows[i]) {
				return i
			}
		}
		return -1
	}
	hasID := func(r *format.SnapshotRow) bool { return r.ID == s.id }
	hasName := func(r *format.SnapshotRow) bool { return r.Name == s.name }

	found := -1
	switch s.kind {
	case selectID:
		found = first(hasID)
	case selectName:
		found = first(hasName)
	case selectBoth:
		found = first(func(r *format.SnapshotRow) bool { return hasID(r) && hasName(r) })
	case selectEither:
		if found = first(hasID); found < 0 {
			found = first(hasName)
		}
	}
	if found < 0 {
		return 0, fmt.Errorf("%s: %w", s, ErrNotFound)
	}
	return found, nil
}

// newSnapshotID returns the ID for the next snapshot: one more than the largest number among the IDs, or,
// should that be the largest number of all, the smallest that is free.
func newSnapshotID(rows []format.SnapshotRow) string {
	used := make(map[uint64]bool, len(rows))
	var largest uint64
	for i := range rows {
		if n, err := strconv.ParseUint(rows[i].ID, 10, 64); err == nil {
			used[n] = true
			largest = max(largest, n)
		}
	}
	next := largest + 1
	if largest == math.MaxUint64 {
		for next = 1; used[next]; next++ {
		}
	}
	return strconv.FormatUint(next, 10)
}

// Snapshots returns the snapshots in table order.
func (img *Image) Snapshots() []Snapshot {
	img.mu.Lock()
	defer img.mu.Unlock()
	ss := make([]Snapshot, len(img.rows))
	for i := range img.rows {
		ss[i] = newSnapshot(&img.rows[i])
	}
	return ss
}

// FindSnapshot returns the snapshot that s selects, or ErrNotFound.
func (img *Image) FindSnapshot(s Selector) (Snapshot, error) {
	row, err := img.findRow(s)
	if err != nil {
		return Snapshot{}, err
	}
	return newSnapshot(&row), nil
}

func (img *Image) findRow(s Selector) (format.SnapshotRow, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	i, err := findSnapshot(img.rows, s)
	if err != nil {
		return format.SnapshotRow{}, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	return img.rows[i], nil
}

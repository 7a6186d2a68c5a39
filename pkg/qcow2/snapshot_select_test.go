package qcow2

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

func TestFindSnapshot(t *testing.T) {
	rows := []format.SnapshotRow{
		{ID: "1", Name: "two"}, {ID: "2", Name: "one"}, {ID: "3", Name: "2"}, {ID: "4", Name: "one"}, {ID: "4", Name: "same id"},
	}
	for _, test := range []struct {
		selector Selector
		want     int // -1: ErrNotFound
		says     string
	}{
		{ByID("2"), 1, ""},
		{ByID("4"), 3, ""},
		{ByID("one"), -1, `snapshot with id "one"`},
		{ByName("one"), 1, ""},
		{ByName("2"), 2, ""},
		{ByName("1"), -1, `snapshot "1"`},
		{ByName(""), -1, `snapshot ""`},
		{ByIDAndName("4", "one"), 3, ""},
		{ByIDAndName("4", "same id"), 4, ""},
		{ByIDAndName("1", "one"), -1, `snapshot "one" with id "1"`},
		{ByIDOrName("2"), 1, ""}, // the ID comes first
		{ByIDOrName("two"), 0, ""},
		{ByIDOrName("5"), -1, `snapshot with id or name "5"`},
		{Selector{}, -1, "empty selector"},
	} {
		got, err := findSnapshot(rows, test.selector)
		switch {
		case test.want >= 0 && (err != nil || got != test.want):
			t.Errorf("%s: row %d, %v; want row %d", test.selector, got, err, test.want)
		case test.want < 0 && (!errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), test.says)):
			t.Errorf("%s: row %d, %v; want ErrNotFound that says %q", test.selector, got, err, test.says)
		}
	}
}

func TestNewSnapshotID(t *testing.T) {
	for _, test := range []struct {
		ids  string
		want string
	}{
		{"", "1"},
		{"1 2 3", "4"},
		{"9 1", "10"},
		{"5 x 7y -9 +9", "6"},
		{"18446744073709551614", "18446744073709551615"},
		{"18446744073709551615 1 2 4", "3"},
		{"18446744073709551616", "1"}, // does not fit: not a number
	} {
		var rows []format.SnapshotRow
		for id := range strings.FieldsSeq(test.ids) {
			rows = append(rows, format.SnapshotRow{ID: id})
		}
		if got := newSnapshotID(rows); got != test.want {
			t.Errorf("after %q comes %s, want %s", test.ids, got, test.want)
		}
	}
}

func TestSnapshotOfRow(t *testing.T) {
	row := format.SnapshotRow{
		ID: "1", Name: "n", DateSec: 60, DateNsec: 5, VMClock: math.MaxUint64, VMStateSize: math.MaxUint64, DiskSize: 7, Icount: 3,
	}
	want := Snapshot{
		ID: "1", Name: "n", Date: time.Date(1970, 1, 1, 0, 1, 0, 5, time.UTC), VMClock: math.MaxInt64, VMStateSize: math.MaxInt64, DiskSize: 7, Icount: 3,
	}
	if got := newSnapshot(&row); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

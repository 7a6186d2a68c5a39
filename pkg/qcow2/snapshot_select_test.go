package qcow2

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestFindSnapshot(t *testing.T) {
	rows := []snapshotRow{
		{id: "1", name: "two"}, {id: "2", name: "one"}, {id: "3", name: "2"}, {id: "4", name: "one"}, {id: "4", name: "same id"},
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
		var rows []snapshotRow
		for id := range strings.FieldsSeq(test.ids) {
			rows = append(rows, snapshotRow{id: id})
		}
		if got := newSnapshotID(rows); got != test.want {
			t.Errorf("after %q comes %s, want %s", test.ids, got, test.want)
		}
	}
}

func TestSnapshotOfRow(t *testing.T) {
	row := snapshotRow{
		id: "1", name: "n", dateSec: 60, dateNsec: 5, vmClock: math.MaxUint64, vmStateSize: math.MaxUint64, diskSize: 7, icount: 3,
	}
	want := Snapshot{
		ID: "1", Name: "n", Date: time.Date(1970, 1, 1, 0, 1, 0, 5, time.UTC), VMClock: math.MaxInt64, VMStateSize: math.MaxInt64, DiskSize: 7, Icount: 3,
	}
	if got := newSnapshot(&row); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

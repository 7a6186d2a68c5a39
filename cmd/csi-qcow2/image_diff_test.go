package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Between two snapshots, and from one to the disk, diff names what was written and what was discarded.
func TestDiffSnapshots(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1G")
	mustRunWith(t, "write 0 1M 0x41\nsnapshot one\nwrite 512M 64K 0x42\nsnapshot two\ndiscard 0 512K\n", "image", "io", image)
	one, disk := diffEntry{512 << 20, 64 << 10, false}, diffEntry{0, 512 << 10, true}
	for _, tt := range []struct {
		args []string
		want []diffEntry
	}{
		{[]string{"one", "two"}, []diffEntry{one}},
		{[]string{"two"}, []diffEntry{disk}},
		{[]string{"one"}, []diffEntry{disk, one}},
		{[]string{"--id", "2", "1"}, []diffEntry{{one.Start, one.Length, true}}},
		{[]string{"one", "one"}, []diffEntry{}},
	} {
		var got []diffEntry
		decode(t, mustRun(t, append([]string{"image", "snapshot", "diff", "-o", "json", image}, tt.args...)...), &got)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%v: %+v, want %+v", tt.args, got, tt.want)
		}
	}
	table := mustRun(t, "image", "snapshot", "diff", image, "one")
	for _, want := range []string{"0x0         0x80000  zero", "0x20000000  0x10000  data", "written: 64 KiB, zeroed: 512 KiB"} {
		if !strings.Contains(table, want) {
			t.Errorf("it lacks %q:\n%s", want, table)
		}
	}
	holdWithQEMU(t, image)
	mustRun(t, "image", "snapshot", "diff", "-U", image, "one", "two")
	for want, args := range map[string][]string{
		"three: not found": {image, "three", "-U"},
		"in use":           {image, "one"},
		"FILE FROM [TO]":   {image},
	} {
		if r := run(t, append([]string{"image", "snapshot", "diff"}, args...)...); r.status == 0 || !strings.Contains(r.stderr, want) {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestCreate(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		size  string
		flags []string
		want  string // of qemu-img info
	}{
		{"1G", nil, `"virtual-size": 1073741824`},
		{"1Gi", nil, `"virtual-size": 1073741824`},
		{"1000", nil, `"virtual-size": 1024`},
		{"0", nil, `"virtual-size": 0`},
		{"0x10000", nil, `"virtual-size": 65536`},
		{"16T", nil, `"virtual-size": 17592186044416`},
		{"10M", []string{"--cluster-size", "512"}, `"cluster-size": 512`},
		{"10M", []string{"--cluster-size", "2M"}, `"cluster-size": 2097152`},
		{"10M", nil, `"cluster-size": 65536`},
		{"10M", nil, `"compat": "1.1"`},
		{"10M", []string{"--version", "2"}, `"compat": "0.10"`},
	} {
		t.Run(strings.Join(append([]string{tt.size}, tt.flags...), " "), func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "x.qcow2")
			mustRun(t, append([]string{"image", "create", image, tt.size}, tt.flags...)...)
			if info := qemu(t, "qemu-img", "info", "--output=json", image); !strings.Contains(info, tt.want) {
				t.Errorf("qemu-img info has no %s:\n%s", tt.want, info)
			}
			verify(t, image)
		})
	}
}

// TestInfo compares what this program and QEMU say about images, key by key.
func TestInfo(t *testing.T) {
	t.Parallel()
	for name, options := range map[string]string{
		"default": "compat=1.1",
		"old":     "compat=0.10",
		"small":   "cluster_size=4096",
		"lazy":    "lazy_refcounts=on",
	} {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "x.qcow2")
			qemu(t, "qemu-img", "create", "-f", "qcow2", "-o", options, image, "64M")
			qemuIO(t, image, "write -P 1 0 1M")
			qemu(t, "qemu-img", "snapshot", "-c", "by QEMU", image)
			mustRun(t, "image", "snapshot", "create", image, "by us")
			var theirs, ours map[string]any
			decode(t, qemu(t, "qemu-img", "info", "--output=json", image), &theirs)
			decode(t, mustRun(t, "image", "info", "-o", "json", image), &ours)
			contains(t, name, theirs, ours)
			if table := mustRun(t, "image", "info", image); !strings.Contains(table, "by QEMU") || !strings.Contains(table, "64 MiB") {
				t.Errorf("the table has not all of it:\n%s", table)
			}
		})
	}
}

// contains checks that all that QEMU says is in ours.
func contains(t *testing.T, path string, theirs, ours any) {
	t.Helper()
	switch theirs := theirs.(type) {
	case map[string]any:
		ours, _ := ours.(map[string]any)
		for key, value := range theirs {
			contains(t, path+"."+key, value, ours[key])
		}
	case []any:
		ours, _ := ours.([]any)
		if len(ours) != len(theirs) {
			t.Errorf("%s: %d elements, QEMU has %d", path, len(ours), len(theirs))
			return
		}
		for i, value := range theirs {
			contains(t, fmt.Sprintf("%s[%d]", path, i), value, ours[i])
		}
	default:
		if !reflect.DeepEqual(theirs, ours) {
			t.Errorf("%s is %v, QEMU says %v", path, ours, theirs)
		}
	}
}

func decode(t *testing.T, data string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(data), into); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
}

// TestMap compares the map of an image with QEMU's.
func TestMap(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	qemu(t, "qemu-img", "create", "-f", "qcow2", image, "1G")
	qemuIO(t, image, "write -P 1 0 256K", "write -z 128K 64K", "write -P 2 700M 128K", "discard 700M 64K",
		"write -c -P 3 800M 64K", "write -z 1000M 1M")
	var theirs, ours []mapEntry
	decode(t, qemu(t, "qemu-img", "map", "--output=json", image), &theirs)
	decode(t, mustRun(t, "image", "map", "-o", "json", image), &ours)
	for i := range ours {
		ours[i].Compressed = false // QEMU 7.2 does not say
	}
	if theirs, ours := merge(theirs), merge(ours); !reflect.DeepEqual(theirs, ours) {
		t.Errorf("map\n%s\nQEMU's is\n%s", toJSON(t, ours), toJSON(t, theirs))
	}

	table := mustRun(t, "image", "map", image)
	for _, want := range []string{"hole", "data", "zero", "compressed"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %s in the table:\n%s", want, table)
		}
	}
	mustRun(t, "image", "snapshot", "create", image, "s")
	mustRun(t, "image", "resize", image, "2G")
	decode(t, mustRun(t, "image", "map", "-o", "json", "--snapshot", "s", image), &ours)
	last := ours[len(ours)-1]
	if end := last.Start + last.Length; end != 1<<30 {
		t.Errorf("the map of the snapshot ends at %d, not at its own size", end)
	}
}

// merge joins entries that continue each other: QEMU and we end them at different places.
func merge(entries []mapEntry) []mapEntry {
	var out []mapEntry
	for _, e := range entries {
		if n := len(out); n > 0 && continues(out[n-1], e) {
			out[n-1].Length += e.Length
			continue
		}
		out = append(out, e)
	}
	return out
}

func continues(a, b mapEntry) bool {
	if (a.Offset == nil) != (b.Offset == nil) || (a.Offset != nil && *a.Offset+a.Length != *b.Offset) {
		return false
	}
	b.Start, b.Length, b.Offset = a.Start, a.Length, a.Offset
	return reflect.DeepEqual(a, b)
}

func toJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	qemuIO(t, image, "write -P 1 0 1M")
	mustRun(t, "image", "snapshot", "create", image, "one") // ID 1
	qemuIO(t, image, "write -P 2 0 1M")
	mustRun(t, "image", "snapshot", "create", image, "1") // ID 2, with the other's ID as its name
	qemuIO(t, image, "write -P 3 0 1M")
	qemu(t, "qemu-img", "snapshot", "-c", "three", image)
	mustRun(t, "image", "resize", image, "128M")
	verify(t, image)

	mustRun(t, "image", "snapshot", "goto", image, "1")
	qemuIO(t, image, "read -P 2 0 1M")
	mustRun(t, "image", "snapshot", "goto", image, "3", "--id")
	qemuIO(t, image, "read -P 3 0 1M", "length")
	mustRun(t, "image", "snapshot", "goto", image, "one")
	qemuIO(t, image, "read -P 1 0 1M")
	verify(t, image)

	var list []snapshotInfo
	decode(t, mustRun(t, "image", "snapshot", "list", image, "-o", "json"), &list)
	if len(list) != 3 || list[0].Name != "one" || list[1].Name != "1" || list[1].ID != "2" || list[2].DiskSize != 64<<20 {
		t.Errorf("list is %+v", list)
	}
	mustRun(t, "image", "snapshot", "delete", image, "1")
	if got := mustRun(t, "image", "snapshot", "list", image); strings.Count(got, "\n") != 3 || strings.Contains(got, "2   1") {
		t.Errorf("after delete:\n%s", got)
	}
	verify(t, image)
}

// TestSnapshotByName: a name is never taken for an ID, nor an ID for a name, and one that is not unique is refused.
func TestSnapshotByName(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	mustRun(t, "image", "snapshot", "create", image, "one") // ID 1
	mustRun(t, "image", "snapshot", "create", image, "1")   // ID 2
	mustRun(t, "image", "snapshot", "delete", image, "1")
	refused := func(want string, args ...string) {
		t.Helper()
		if r := run(t, append([]string{"image"}, args...)...); r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("%v: %+v, want %q", args, r, want)
		}
	}
	hint := "snapshot 1: not found (it is the ID of snapshot one, which --id means)"
	refused(hint, "snapshot", "delete", image, "1")
	refused(hint, "snapshot", "goto", image, "1")
	refused(hint, "export", image, "-", "--snapshot", "1")
	refused(hint, "map", image, "--snapshot", "1")
	if r := runWith(t, "delete 1", "image", "io", image); r.status != 1 || !strings.Contains(r.stderr, hint) {
		t.Errorf("image io: %+v", r)
	}
	refused(`snapshot with id "one": not found`, "snapshot", "delete", image, "--id", "one")
	refused("not found", "export", image, "-", "--snapshot", "") // a script's variable that is not set
	refused("which one?", "export", image, "-", "--id")
	mustRun(t, "image", "export", image, "-", "--snapshot", "1", "--id")
	mustRun(t, "image", "map", image, "--snapshot", "1", "--id")

	qemu(t, "qemu-img", "snapshot", "-c", "twin", image) // ID 2
	qemuIO(t, image, "write -P 1 0 64K")
	qemu(t, "qemu-img", "snapshot", "-c", "twin", image)
	refused("2 snapshots have the name twin, their IDs are 2, 3", "snapshot", "delete", image, "twin")
	mustRun(t, "image", "snapshot", "goto", image, "--id", "2")
	qemuIO(t, image, "read -P 0 0 64K")
	mustRun(t, "image", "snapshot", "delete", image, "--id", "2")
	mustRun(t, "image", "snapshot", "goto", image, "twin")
	qemuIO(t, image, "read -P 1 0 64K")
	verify(t, image)
}

func TestResize(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M", "--cluster-size", "512")
	qemuIO(t, image, "write -P 7 0 1M")
	mustRun(t, "image", "resize", image, "1G")
	qemuIO(t, image, "read -P 7 0 1M", "read -P 0 1M 1M", "write -P 8 1023M 1M")
	verify(t, image)
	for size, want := range map[string]string{"1M": "cannot be made smaller", "+9223372036854775807": "too large"} {
		if r := run(t, "image", "resize", image, size); r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("to %s: %+v, want %q", size, r, want)
		}
	}
	for _, size := range []string{"+-1M", "++1M", "+"} {
		if r := run(t, "image", "resize", image, size); r.status != 2 || !strings.Contains(r.stderr, "not a size") {
			t.Errorf("to %s: %+v", size, r)
		}
	}
	for _, step := range []struct {
		size string
		want int64
	}{{"+64M", 1<<30 + 64<<20}, {"02000M", 2000 << 20}, {"+1", 2000<<20 + 512}} {
		mustRun(t, "image", "resize", image, step.size)
		if info := qemu(t, "qemu-img", "info", "--output=json", image); !strings.Contains(info, fmt.Sprintf(`"virtual-size": %d,`, step.want)) {
			t.Errorf("to %s: not %d\n%s", step.size, step.want, info)
		}
	}
}

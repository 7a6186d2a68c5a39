package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestIO(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	out := mustRunWith(t, `
# a comment
write 0 4M 0xaa
write 1000 3 66
read 998 7
snapshot before the change
write 0 64K 1
zero 64K 64K
discard 1M 1M
  flush
read 0 64K 1
read 64K 64K 0
read 1M 1M 0
snapshot after
goto before the change
read 1M 1M 0xaa
goto after
delete before the change`, "image", "io", image)
	if want := "000003e6  aa aa 42 42 42 aa aa                             |..BBB..|\n"; out != want {
		t.Errorf("read shows\n%swant\n%s", out, want)
	}
	qemuIO(t, image, "read -P 1 0 64K", "read -P 0 64K 64K", "read -P 0xaa 128K 896K", "read -P 0 1M 1M", "read -P 0xaa 2M 2M")
	if list := qemu(t, "qemu-img", "snapshot", "-l", image); strings.Contains(list, "before") || !strings.Contains(list, "after") {
		t.Errorf("snapshots:\n%s", list)
	}
	verify(t, image)
}

func TestIOErrors(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	for script, want := range map[string]string{
		"write 0 4K 1\nread 0 4K 2": "line 2: read: the byte at 0 (0x0) is 0x01, not 0x02",
		"\n#\nwrite 0 1K":           "line 3: write: wants OFF LEN BYTE",
		"write 0 1K 1 1":            "line 1: write: wants OFF LEN BYTE",
		"zero 0 1K 1":               "line 1: zero: wants OFF LEN",
		"write 0 1K 256":            `line 1: write: "256" is not a byte`,
		"write 0 -1 1":              `line 1: write: "-1" is not a size`,
		"write 1M 1 1":              "line 1: write: 1 bytes at 1048576: out of range",
		"read 0 8E 1":               `line 1: read: "8E" is not a size`,
		"read 1 0x7fffffffffffffff": "out of range",
		"discard 1M 1":              "line 1: discard: ",
		"flush now":                 "line 1: flush: takes no argument",
		"erase 0 1":                 "line 1: erase: no such command",
		"snapshot":                  "line 1: snapshot: wants NAME",
		"goto nothing":              "line 1: goto: snapshot nothing: not found",
		"snapshot a\nsnapshot a":    "line 2: snapshot: ",
	} {
		r := runWith(t, script, "image", "io", image)
		if r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("%q: exit status %d, %q; want 1, %q", script, r.status, r.stderr, want)
		}
	}
	verify(t, image)
	qemuIO(t, image, "read -P 1 0 4K") // what was done before the line that failed stays
}

// TestIOOfUncounted: of an image whose writer does not count clusters every byte stays, whatever is tried, and it can be read.
func TestIOOfUncounted(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
	qemuIO(t, image, "write -P 1 0 8M")
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	clear(before[128<<10 : 192<<10]) // the refcount block
	if err := os.WriteFile(image, before, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRunWith(t, "read 0 8M 1", "image", "io", image)
	for _, args := range [][]string{
		{"image", "io", image},
		{"image", "snapshot", "create", image, "s"},
		{"image", "resize", image, "128M"},
		{"image", "snapshot", "delete", image, "none"},
	} {
		r := runWith(t, "read 0 8M 1\nwrite 0 64K 2", args...)
		if r.status != 1 || !strings.Contains(r.stderr, "image check --repair all") {
			t.Errorf("%q: exit status %d, %q", args, r.status, r.stderr)
		}
	}
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image was changed: %v", err)
	}
	mustRun(t, "image", "check", "--repair", "all", image)
	mustRunWith(t, "write 8M 64K 2\nread 0 8M 1", "image", "io", image)
	verify(t, image)
}

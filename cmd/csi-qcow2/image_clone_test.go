package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestClone: a clone has the content of the active disk or of a snapshot, and nothing else of its source.
func TestClone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	image := path("x@y.qcow2") // an @ of a file's own is none of a snapshot
	mustRun(t, "image", "create", image, "4M")
	qemuIO(t, image, "write -P 1 0 1M", "write -c -P 4 2M 64K")
	mustRun(t, "image", "snapshot", "create", image, "s")
	qemuIO(t, image, "write -P 2 0 1M")
	mustRun(t, "image", "clone", image, path("now"))
	mustRun(t, "image", "clone", image+"@s", path("then"))
	for name, pattern := range map[string]string{"now": "2", "then": "1"} {
		verify(t, path(name))
		qemuIO(t, path(name), "read -P "+pattern+" 0 1M", "read -P 4 2M 64K", "read -P 0 3M 1M")
		var info imageInfo
		decode(t, mustRun(t, "image", "info", "-o", "json", path(name)), &info)
		if len(info.Snapshots) != 0 || info.VirtualSize != 4<<20 {
			t.Errorf("%s: %+v", name, info)
		}
	}
	for args, want := range map[string]string{image + "@none": "not found", image + "@": "not found", path("none"): "no such file"} {
		if r := run(t, "image", "clone", args, path("new")); r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("clone %s: %+v", args, r)
		}
	}
	if r := run(t, "image", "clone", image, path("now")); r.status != 1 || !strings.Contains(r.stderr, "is there already") {
		t.Errorf("onto another: %+v", r)
	}
	if _, err := os.Lstat(path("new")); err == nil {
		t.Error("a failed clone left a file")
	}
	holdWithQEMU(t, image)
	mustRun(t, "image", "clone", "-U", image+"@s", path("of one in use"))
	qemuIO(t, path("of one in use"), "read -P 1 0 1M")
}

// TestCompact: zeros that were written, and clusters that QEMU has freed and left, go back to the file system.
func TestCompact(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	qemuIO(t, image, "write -P 1 0 4M", "write -P 0 8M 16M", "write -P 0 32M 96K", "write -P 5 32864K 32K")
	qemuIO(t, image, "write -P 1 40M 4M", "write -P 2 0 4M")
	qemu(t, "qemu-io", "--image-opts", "driver=qcow2,discard=unmap,pass-discard-request=off,file.filename="+image,
		"-c", "discard 40M 4M") // is free, and stays in the file
	qemu(t, "qemu-img", "snapshot", "-c", "s", image)
	before := occupied(t, image)
	mustRun(t, "image", "compact", image)
	if after := occupied(t, image); after > before-3<<20 {
		t.Errorf("with a snapshot that holds the zeros it occupies %d bytes, before %d", after, before)
	}
	qemu(t, "qemu-img", "snapshot", "-d", "s", image)
	before = occupied(t, image)
	said := mustRun(t, "image", "compact", image)
	if after := occupied(t, image); after > 5<<20 || !strings.Contains(said, humanSize(after)+", before it was "+humanSize(before)) {
		t.Errorf("it occupies %d bytes, before %d; it says %q", after, before, said)
	}
	verify(t, image)
	qemuIO(t, image, "read -P 2 0 4M", "read -P 0 4M 28M", "read -P 0 32M 96K", "read -P 5 32864K 32K", "read -P 0 32896K 31M")
}

func TestRenameSnapshot(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	mustRun(t, "image", "snapshot", "create", image, "one")
	mustRun(t, "image", "snapshot", "create", image, "two")
	mustRun(t, "image", "snapshot", "rename", image, "one", "1st")
	mustRun(t, "image", "snapshot", "rename", image, "--id", "2", "2nd")
	mustRun(t, "image", "snapshot", "rename", image, "2nd", "2nd") // which it has
	var list []snapshotInfo
	decode(t, mustRun(t, "image", "snapshot", "list", "-o", "json", image), &list)
	if len(list) != 2 || list[0].ID != "1" || list[0].Name != "1st" || list[1].ID != "2" || list[1].Name != "2nd" {
		t.Errorf("%+v", list)
	}
	for _, tt := range []struct{ from, to, want string }{
		{"one", "x", "not found"},
		{"1st", "2nd", "already exists"},
		{"1st", "", "1 to 255 bytes"},
		{"1st", strings.Repeat("x", 256), "1 to 255 bytes"},
	} {
		if r := run(t, "image", "snapshot", "rename", image, tt.from, tt.to); r.status != 1 || !strings.Contains(r.stderr, tt.want) {
			t.Errorf("%s to %.10q: %+v", tt.from, tt.to, r)
		}
	}
	verify(t, image)
}

package qcow2

import (
	"os"
	"testing"
)

// TestBlank: an image is blank only if nothing says that it holds, or held, anything.
func TestBlank(t *testing.T) {
	t.Parallel()
	create := func(t *testing.T, path string) { qemuImg(t, "create", "-q", "-f", "qcow2", path, "1G") }
	open := func(t *testing.T, path string, use func(*Image) error) {
		t.Helper()
		f, err := OpenFile(path, false)
		must(t, err)
		img, err := Open(f, OpenOptions{})
		must(t, err)
		must(t, use(img))
		must(t, img.Close())
	}
	for name, c := range map[string]struct {
		make func(t *testing.T, path string)
		want bool
	}{
		"QEMU's": {create, true},
		"ours": {func(t *testing.T, path string) {
			f, err := CreateFile(path)
			must(t, err)
			must(t, Create(t.Context(), f, 64<<30, CreateOptions{ClusterSize: 4096}))
			must(t, f.Close())
		}, true},
		"snapshots of nothing": {func(t *testing.T, path string) {
			create(t, path)
			qemuImg(t, "snapshot", "-c", "a", path)
			qemuImg(t, "snapshot", "-c", "b", path)
			open(t, path, func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "c", nil); return err })
		}, true},
		"grown": {func(t *testing.T, path string) {
			create(t, path)
			qemuImg(t, "resize", "-q", path, "5T")
		}, true},
		"written": {func(t *testing.T, path string) {
			create(t, path)
			qemuIO(t, path, "write -q 0 512")
		}, false},
		"zeros": {func(t *testing.T, path string) {
			create(t, path)
			qemuIO(t, path, "write -q -z 512M 64k")
		}, false},
		"discarded": {func(t *testing.T, path string) {
			create(t, path)
			qemuIO(t, path, "write -q 0 1M", "discard -q 0 1G")
			open(t, path, func(img *Image) error { return img.Discard(0, 1<<30) })
		}, false},
		"a snapshot of something": {func(t *testing.T, path string) {
			create(t, path)
			qemuImg(t, "snapshot", "-c", "empty", path)
			qemuIO(t, path, "write -q 0 1M")
			qemuImg(t, "snapshot", "-c", "full", path)
			qemuImg(t, "snapshot", "-a", "empty", path)
		}, false},
		"back to nothing": {func(t *testing.T, path string) {
			create(t, path)
			qemuImg(t, "snapshot", "-c", "empty", path)
			qemuIO(t, path, "write -q 0 1M")
			qemuImg(t, "snapshot", "-a", "empty", path)
		}, true},
		"an L1 table that was lost": {func(t *testing.T, path string) {
			create(t, path)
			qemuIO(t, path, "write -q 0 1M")
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			must(t, err)
			_, err = f.WriteAt(make([]byte, 64<<10), 3*64<<10)
			must(t, err)
			must(t, f.Close())
		}, false},
		"an L1 table that was cut off": {func(t *testing.T, path string) {
			create(t, path)
			must(t, os.Truncate(path, 3*64<<10))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := tempImage(t)
			c.make(t, path)
			for _, readOnly := range []bool{true, false} {
				f, err := OpenFile(path, readOnly)
				must(t, err)
				img, err := Open(f, OpenOptions{ReadOnly: readOnly})
				must(t, err)
				got, err := img.Blank()
				must(t, err)
				if got != c.want {
					t.Errorf("read-only %v: blank is %v, want %v", readOnly, got, c.want)
				}
				if !readOnly {
					_, err = img.WriteAt(make([]byte, 1), 0)
					must(t, err)
					if got, err := img.Blank(); err != nil || got {
						t.Errorf("just written, not flushed: %v, %v", got, err)
					}
				}
				must(t, img.Close())
			}
			if c.want || name == "written" {
				if res := runQemuCheck(t, path); res.Corruptions != 0 || res.Leaks != 0 {
					t.Errorf("qemu-img check: %+v", res)
				}
			}
		})
	}
}

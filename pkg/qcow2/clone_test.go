package qcow2

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// TestCloneSharesBlocks clones an image with a snapshot where the file system can share blocks, and where it cannot: the
// content is the same, and only a copy takes space.
func TestCloneSharesBlocks(t *testing.T) {
	const data, fsSize = 24 << 20, 320 << 20 // XFS wants 300 MiB
	for name, c := range map[string]struct {
		dir    string
		shares bool
	}{
		"XFS":   {testfs.Image(t, "xfs", fsSize, "mkfs.xfs", "-q", "-m", "reflink=1"), true},
		"btrfs": {testfs.Image(t, "btrfs", fsSize, "mkfs.btrfs", "-q"), true},
		"ext4":  {testfs.Image(t, "ext4", fsSize, "mkfs.ext4", "-q"), false},
	} {
		t.Run(name, func(t *testing.T) {
			source, path := filepath.Join(c.dir, "source.qcow2"), filepath.Join(c.dir, "clone.qcow2")
			createFile(t, source, 64<<20+format.SectorSize, CreateOptions{})
			img := openPath(t, source)
			_, err := img.WriteAt(stamp(1, 0, data), 0)
			must(t, err)
			_, err = img.CreateSnapshot(t.Context(), "old", nil)
			must(t, err)
			_, err = img.WriteAt(stamp(2, 64<<20, format.SectorSize), 64<<20) // in a cluster that the disk's end cuts
			must(t, err)
			must(t, img.Flush())
			must(t, img.f.Sync())

			before := freeBytes(t, c.dir)
			dst, err := CreateFile(path)
			must(t, err)
			var last, total int64
			must(t, Clone(t.Context(), dst, img.Active(), 0, func(done, all int64) { last, total = done, all }))
			must(t, dst.Close())
			taken := before - freeBytes(t, c.dir)
			if shared := taken < data/2; shared != c.shares {
				t.Errorf("a clone of %d bytes has taken %d", int64(data), taken)
			}
			if last != total || total < data {
				t.Errorf("the last progress was %d of %d", last, total)
			}

			clone := openPath(t, path)
			want, got := make([]byte, img.Size()), make([]byte, img.Size())
			_, err = img.ReadAt(want, 0)
			must(t, err)
			_, err = clone.ReadAt(got, 0)
			must(t, err)
			if i := difference(got, want); i >= 0 {
				t.Errorf("the clone differs at %#x", i)
			}
			// What is written to one is not seen in the other.
			_, err = img.WriteAt(stamp(3, 0, data), 0)
			must(t, err)
			_, err = clone.ReadAt(got, 0)
			must(t, err)
			if i := difference(got, want); i >= 0 {
				t.Errorf("a write to the source shows in the clone at %#x", i)
			}
			for _, i := range []*Image{clone, img} {
				must(t, i.Close())
			}
			for _, p := range []string{path, source} {
				if q := runQemuCheck(t, p); q.exit != 0 {
					t.Error(q.output)
				}
			}
		})
	}
}

func openPath(t *testing.T, path string) *Image {
	t.Helper()
	f, err := OpenFile(path, false)
	must(t, err)
	img, err := Open(f, OpenOptions{})
	must(t, err)
	return img
}

// freeBytes returns how much of a file system is free, when all that was written has its blocks.
func freeBytes(t *testing.T, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	must(t, unix.Syncfs(int(d.Fd())))
	var s unix.Statfs_t
	must(t, unix.Fstatfs(int(d.Fd()), &s))
	return int64(s.Bfree) * s.Bsize
}

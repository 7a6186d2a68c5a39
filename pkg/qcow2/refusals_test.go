package qcow2

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// TestRefusals asks for what cannot be: each is refused by a named error that says what is wrong, and nothing changes.
func TestRefusals(t *testing.T) {
	create := func(size int64, o CreateOptions) func(*Image) error {
		return func(*Image) error {
			f := newMemFile("new")
			err := Create(t.Context(), f, size, o)
			if f.content.size != 0 {
				t.Error("something is left")
			}
			return err
		}
	}
	snapshot := func(name string) func(*Image) error {
		return func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), name, nil); return err }
	}
	for name, c := range map[string]struct {
		want error
		says string
		do   func(*Image) error
	}{
		"clusters of no power of two":  {ErrUnsupported, "1000", create(1<<20, CreateOptions{ClusterSize: 1000})},
		"clusters too small":           {ErrUnsupported, "256", create(1<<20, CreateOptions{ClusterSize: 256})},
		"clusters too large":           {ErrUnsupported, "4194304", create(1<<20, CreateOptions{ClusterSize: 4 << 20})},
		"version 4":                    {ErrUnsupported, "version 4", create(1<<20, CreateOptions{Version: 4})},
		"refcounts of 3 bits":          {ErrUnsupported, "3 bits", create(1<<20, CreateOptions{RefcountBits: 3})},
		"refcounts of 8 in version 2":  {ErrUnsupported, "8 bits", create(1<<20, CreateOptions{RefcountBits: 8, Version: 2})},
		"subclusters in version 2":     {ErrUnsupported, "version 2", create(1<<20, CreateOptions{ExtendedL2: true, Version: 2})},
		"subclusters in small ones":    {ErrUnsupported, "16 KiB", create(1<<20, CreateOptions{ExtendedL2: true, ClusterSize: 8 << 10})},
		"a negative size":              {ErrOutOfRange, "-1", create(-1, CreateOptions{})},
		"a size that no L1 table has":  {ErrLimit, "larger clusters", create(1<<50, CreateOptions{ClusterSize: 512})},
		"the largest number as a size": {ErrLimit, "larger clusters", create(math.MaxInt64, CreateOptions{})},
		"preallocated counts beyond all limits": {
			ErrLimit, "refcount table", create(1<<50, CreateOptions{RefcountBits: 64, Preallocation: PreallocationMetadata}),
		},
		"an image over another": {ErrExists, "512 bytes", func(*Image) error {
			f := newMemFile("other")
			must(t, f.Truncate(512))
			return Create(t.Context(), f, 1<<20, CreateOptions{})
		}},
		"a snapshot without a name":   {ErrLimit, "1 to", snapshot("")},
		"a snapshot with a long name": {ErrLimit, "65536", snapshot(strings.Repeat("x", 65536))},
		"a snapshot of the same name": {ErrExists, "there", snapshot("there")},
		"another snapshot's deletion": {ErrNotFound, "gone", func(img *Image) error { return img.DeleteSnapshot(t.Context(), ByName("gone")) }},
		"the deletion of an open one": {ErrInUse, "there", func(img *Image) error {
			return withView(t, img, func(s Selector) error { return img.DeleteSnapshot(t.Context(), s) })
		}},
		"a goto to none":                  {ErrNotFound, "gone", func(img *Image) error { return img.GotoSnapshot(t.Context(), ByName("gone")) }},
		"to find none":                    {ErrNotFound, "gone", func(img *Image) error { _, err := img.FindSnapshot(ByName("gone")); return err }},
		"a disk that shrinks":             {ErrUnsupported, "shrink", func(img *Image) error { return img.Resize(t.Context(), format.SectorSize) }},
		"a disk without end":              {ErrLimit, "L1 table", func(img *Image) error { return img.Resize(t.Context(), 1<<50) }},
		"a read behind the end":           {ErrOutOfRange, "disk of", func(img *Image) error { _, err := img.ReadAt(make([]byte, 1), img.Size()); return err }},
		"a write before the beginning":    {ErrOutOfRange, "-1", func(img *Image) error { _, err := img.WriteAt(make([]byte, 1), -1); return err }},
		"a discard of more than there is": {ErrOutOfRange, "disk of", func(img *Image) error { return img.Discard(0, math.MaxInt64) }},
		"a snapshot's read behind its end": {ErrOutOfRange, "there", func(img *Image) error {
			return withView(t, img, func(s Selector) error {
				v, err := img.OpenSnapshot(s)
				must(t, err)
				_, err = v.ReadAt(make([]byte, 1), v.Size())
				must(t, v.Close())
				return err
			})
		}},
		"a closed view": {ErrClosed, "view of", func(img *Image) error {
			v, err := img.OpenSnapshot(ByName("there"))
			must(t, err)
			must(t, v.Close())
			_, err = v.ReadAt(make([]byte, 1), 0)
			return errors.Join(err, v.Close())
		}},
		"a smaller clone": {ErrOutOfRange, "512", func(img *Image) error {
			return Clone(t.Context(), newMemFile("clone"), img.Active(), format.SectorSize, nil)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile("refuses")
			must(t, Create(t.Context(), f, 64<<10, CreateOptions{ClusterSize: 512}))
			img, err := Open(f, OpenOptions{})
			must(t, err)
			_, err = img.WriteAt(stamp(1, 0, 4096), 0)
			must(t, err)
			_, err = img.CreateSnapshot(t.Context(), "there", nil)
			must(t, err)
			before := f.clone()
			if err := c.do(img); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v that says %q", err, c.want, c.says)
			}
			if !sameContent(f, before) {
				t.Error("the file has changed")
			}
			must(t, img.Close())
			if err := img.Close(); !errors.Is(err, ErrClosed) {
				t.Errorf("closed twice: %v", err)
			}
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// withView runs fn while the snapshot "there" is open.
func withView(t *testing.T, img *Image, fn func(Selector) error) error {
	t.Helper()
	v, err := img.OpenSnapshot(ByName("there"))
	must(t, err)
	err = fn(ByName("there"))
	must(t, v.Close())
	return err
}

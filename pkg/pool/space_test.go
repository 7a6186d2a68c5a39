package pool

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func space(t *testing.T, p *Pool) Space {
	t.Helper()
	s, err := p.Space(nil)
	must(t, err)
	return s
}

func TestSpace(t *testing.T) {
	p := poolIn(t, testfs.Tmpfs(t, "256m"))
	empty := space(t, p)
	if empty.Total != 256<<20 || empty.Used != 0 || empty.Promised != 0 || empty.Free > empty.Total || empty.Free < 250<<20 {
		t.Errorf("an empty pool: %+v", empty)
	}

	id := create(t, p, "v")
	created := space(t, p)
	if created.Used == 0 || created.Used > 1<<20 || created.Promised != testSize-created.Used {
		t.Errorf("a new volume: %+v", created)
	}

	const written = 16 << 20
	promised, err := p.Space(map[string]int64{id: testSize, "other": 1 << 20}) // a size that it has, and one to come
	must(t, err)
	if promised.Promised != created.Promised+1<<20 {
		t.Errorf("with a promise of 1 MiB more: %+v, before %+v", promised, created)
	}
	if got, err := p.Space(map[string]int64{id: testSize + 4096}); err != nil || got.Promised != created.Promised+4096 {
		t.Errorf("with a promise to grow by 4 KiB: %+v, %v, before %+v", got, err, created)
	}
	l := lock(t, p, id)
	img, err := l.Open(false)
	must(t, err)
	data := make([]byte, written)
	for i := range data {
		data[i] = byte(i) | 1
	}
	must(t, errOf(img.WriteAt(data, 0)), img.Flush())
	grown := space(t, p) // also while the image is open
	if grown.Used < created.Used+written || grown.Promised != testSize-grown.Used || grown.Free > created.Free-written {
		t.Errorf("after %d written bytes: %+v, before %+v", written, grown, created)
	}
	must(t, img.Resize(t.Context(), 2*testSize))
	if got := space(t, p); got.Promised != 2*testSize-got.Used {
		t.Errorf("the image's own size is not what counts: %+v", got)
	}
	must(t, img.Close())

	must(t, l.Update(func(v *Volume) { v.Tombstone = true }))
	if got := space(t, p); got.Promised != 0 || got.Used < written {
		t.Errorf("a tombstone: %+v", got)
	}
	must(t, l.Remove(), l.Unlock())
	if got := space(t, p); got.Used != 0 || got.Promised != 0 || got.Free < empty.Free-1<<20 {
		t.Errorf("everything removed: %+v, at first %+v", got, empty)
	}
}

// What is being created is promised from the start: two volumes at once must not be given the same space.
func TestSpaceOfAVolumeInTheMaking(t *testing.T) {
	p := newPool(t)
	err := p.Create(t.Context(), newVolume(p, "v"), func(context.Context, string) error {
		if got := space(t, p); got.Promised != testSize {
			t.Errorf("promised: %d", got.Promised)
		}
		return errFill
	})
	want(t, "Create", err, errFill)
	if got := space(t, p); got.Promised != 0 {
		t.Errorf("promised after it has failed: %d", got.Promised)
	}
}

func TestSpaceOfHostileImages(t *testing.T) {
	p := newPool(t)
	put := func(name, image string, size int64) {
		v := newVolume(p, name)
		v.Size = size
		must(t, p.Create(t.Context(), v, func(_ context.Context, path string) error {
			return os.WriteFile(path, []byte(image), 0o600)
		}))
	}
	head := "QFI\xfb\x00\x00\x00\x03" + strings.Repeat("\x00", 15) + "\x10"
	for name, image := range map[string]string{
		"empty": "", "magic": "QFI\xfb", "negative": head + strings.Repeat("\xff", 8) + strings.Repeat("\x00", 512), "foreign": "not an image, but long enough",
	} {
		put(name, image, testSize)
	}
	v := newVolume(p, "directory")
	must(t, p.Create(t.Context(), v, fillQCOW2))
	must(t, os.Remove(p.ImagePath(v.ID)), os.Mkdir(p.ImagePath(v.ID), 0o700))
	if got := space(t, p); got.Promised < 4*testSize || got.Promised > 5*testSize {
		t.Errorf("promised: %d, want what volume.json says", got.Promised)
	}
	put("largest", "", math.MaxInt64)
	put("as large", "", math.MaxInt64)
	if got := space(t, p); got.Promised != math.MaxInt64 {
		t.Errorf("promised: %d", got.Promised)
	}
}

// Whoever deletes is the one who helps a full file system. It must not need space itself.
func TestDeletingOnAFullFileSystem(t *testing.T) {
	for name, fs := range map[string]struct {
		size int64
		mkfs []string
	}{
		"ext4":  {32 << 20, []string{"mkfs.ext4", "-q", "-F", "-m", "0"}},
		"xfs":   {320 << 20, []string{"mkfs.xfs", "-q"}},
		"btrfs": {128 << 20, []string{"mkfs.btrfs", "-q"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := poolIn(t, filepath.Join(testfs.Image(t, name, fs.size, fs.mkfs...), "pool"))
			tombstone, gone := create(t, p, "tombstone"), create(t, p, "gone")
			testfs.FillUp(t, filepath.Join(p.Dir(), "ballast"))

			failed := p.Create(t.Context(), newVolume(p, "new"), fillQCOW2)
			if !errors.Is(failed, qcow2.ErrNoSpace) {
				t.Errorf("Create on a full file system: %v, want qcow2.ErrNoSpace", failed)
			}
			wantEmpty(t, p, creatingDir)

			l := lock(t, p, tombstone)
			must(t, l.MarkAttached())
			for range 3 {
				must(t, l.Update(func(v *Volume) { v.Tombstone = !v.Tombstone }))
			}
			must(t, l.ClearAttached(), l.MarkAttached(), l.ClearAttached())
			must(t, l.Unlock())
			if v, err := p.Volume(tombstone); err != nil || !v.Tombstone {
				t.Errorf("no tombstone: %+v, %v", v, err)
			}
			l = lock(t, p, gone)
			must(t, l.Remove(), l.Unlock())

			must(t, os.Remove(filepath.Join(p.Dir(), "ballast")))
			checkImage(t, p, create(t, p, "new"))
			checkImage(t, p, tombstone)
		})
	}
}

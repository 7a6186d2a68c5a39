package pool

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// The reserve is there when the file system is full, and covers the metadata of the largest image.
func TestReserve(t *testing.T) {
	for name, fs := range map[string]struct {
		size int64
		mkfs []string
	}{
		"ext4":  {128 << 20, []string{"mkfs.ext4", "-q", "-F", "-m", "0"}},
		"xfs":   {320 << 20, []string{"mkfs.xfs", "-q"}},
		"btrfs": {128 << 20, []string{"mkfs.btrfs", "-q"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := poolIn(t, filepath.Join(testfs.Image(t, name, fs.size, fs.mkfs...), "pool"))
			const diskSize = 8 << 30
			v := newVolume(p, "large")
			must(t, p.Create(t.Context(), v, func(_ context.Context, path string) error {
				f, err := qcow2.CreateFile(path)
				if err != nil {
					return err
				}
				return errors.Join(qcow2.Create(t.Context(), f, diskSize, qcow2.CreateOptions{}), f.Close())
			}))
			must(t, p.KeepReserve(), p.KeepReserve())
			image, err := os.Open(p.ImagePath(v.ID))
			must(t, err)
			h, err := qcow2.Probe(image)
			must(t, err, image.Close())
			need := h.DeletionRoom(fs.size)
			if tables := int64(diskSize / (64 << 10) * 8); need < tables {
				t.Fatalf("%d bytes are needed, the L2 tables alone have %d", need, tables)
			}
			if got := occupied(t, p, reserveFile); got < need || got > 2*need {
				t.Errorf("the reserve has %d bytes, an image needs %d", got, need)
			}

			ballast := filepath.Join(p.Dir(), "ballast")
			testfs.FillUp(t, ballast)
			must(t, p.GiveUpReserve())
			testfs.FillUp(t, filepath.Join(p.Dir(), "metadata"))
			if got := occupied(t, p, "metadata"); got < need {
				t.Errorf("the reserve gave %d bytes, an image needs %d", got, need)
			}
			want(t, "KeepReserve on a full file system", p.KeepReserve(), qcow2.ErrNoSpace)
			must(t, os.Remove(ballast), p.KeepReserve())
			if got := occupied(t, p, reserveFile); got < need {
				t.Errorf("the reserve has %d bytes again, an image needs %d", got, need)
			}
			l := lock(t, p, v.ID)
			must(t, l.Remove(), l.Unlock(), p.KeepReserve())
			if got := occupied(t, p, reserveFile); got > 0 {
				t.Errorf("an empty pool's reserve has %d bytes", got)
			}
		})
	}
}

// Hostile images do not make the reserve eat the pool.
func TestReserveIsBounded(t *testing.T) {
	const total = 256 << 20
	p := poolIn(t, testfs.Tmpfs(t, "256m"))
	must(t, p.Create(t.Context(), newVolume(p, "huge"), func(_ context.Context, path string) error {
		head := make([]byte, 512)
		copy(head, "QFI\xfb")
		head[7], head[23], head[27], head[37], head[103] = 3, 9, 0x10, 0x20, 104 // 64 GiB in clusters of 512 bytes
		if h, err := qcow2.Probe(bytes.NewReader(head)); err != nil || h.DeletionRoom(total) <= total {
			t.Errorf("the image is not hostile: room %d, %v", h.DeletionRoom(total), err)
		}
		return os.WriteFile(path, head, 0o600)
	}))
	must(t, p.KeepReserve())
	if got := occupied(t, p, reserveFile); got > total/reserveShare {
		t.Errorf("the reserve has %d bytes", got)
	}
}

// occupied returns how many bytes of blocks a file of the pool's has.
func occupied(t *testing.T, p *Pool, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(p.Dir(), name), &st))
	return st.Blocks * 512
}

package qcow2

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

func incompatibleBits(f *memFile) uint64 { return get64(f, 72) }

// TestOpenDirty opens images that QEMU was killed over while it postponed their reference counts.
func TestOpenDirty(t *testing.T) {
	for _, options := range []string{"cluster_size=64K", "cluster_size=4K", "cluster_size=512,refcount_bits=1", "cluster_size=64K,extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			path := tempImage(t)
			qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,"+options, path, "4M")
			cmd := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2",
				"-c", "write -P 1 0 300000", "-c", "write -P 2 2M 1M", "-c", "flush", "-c", "sigraise 9", path)
			if err := cmd.Run(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL { //nolint:forcetypeassert // it is one on Linux
				t.Fatalf("qemu-io was not killed: %v", err)
			}
			f := loadMemFile(t, path)
			if incompatibleBits(f) != format.IncompatDirty|incompatibleBits(f)&format.IncompatExtendedL2 {
				t.Fatalf("QEMU left the incompatible features %#x", incompatibleBits(f))
			}
			if r, err := checkFile(t.Context(), f); err != nil || r.Corruptions == 0 {
				t.Fatalf("the counts are right before: %+v, %v", r, err)
			}
			before := readable(t, f)
			img, err := Open(f, OpenOptions{})
			must(t, err)
			if img.Info().DirtyBit {
				t.Error("the dirty bit is still set")
			}
			_, err = img.WriteAt(stamp(1, 1<<20, 4096), 1<<20)
			must(t, err)
			must(t, img.Flush())
			must(t, img.Close())
			f.reopen().save(t, path)
			if q := runQemuCheck(t, path); q.exit != 0 {
				t.Error(q.output)
			}
			delete(before[""], 1<<20)
			for off := range before[""] {
				if off >= 1<<20 && off < 2<<20 {
					delete(before[""], off)
				}
			}
			if diff := before.changed(t, f); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestOpenDirtyAndDamaged gives up nothing on the way.
func TestOpenDirtyAndDamaged(t *testing.T) {
	f := hostileImage(t, 3)
	put64(f, 72, format.IncompatDirty)
	put64(f, l2At(f), 1<<40)
	before := f.clone()
	if _, err := Open(f, OpenOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if h, err := format.ReadHeader(f.reopen(), format.DecodeHeader); err != nil || h.Sector != [format.SectorSize]byte(readSector(before)) {
		t.Errorf("the header was changed, %v", err)
	}
}

func readSector(f *memFile) []byte {
	b := make([]byte, format.SectorSize)
	f.content.readAt(b, 0)
	return b
}

// TestCorruptBit: metadata that guest I/O or an operation on snapshots finds impossible marks the image, and nothing is
// written to it any more until it has been repaired.
func TestCorruptBit(t *testing.T) {
	breakL2 := func(f *memFile) { put64(f, l2At(f), get64(f, l2At(f))|2) }
	breakSnapshot := func(f *memFile) { put64(f, snapshotL1At(f), 1<<40) }
	noCount := func(f *memFile) { f.content.zero(refBlockAt(f), 512) }
	for name, test := range map[string]struct {
		change func(f *memFile)
		use    func(img *Image) error
	}{
		"read":    {breakL2, func(img *Image) error { return errOf(img.ReadAt(make([]byte, 10), 0)) }},
		"write":   {breakL2, func(img *Image) error { return errOf(img.WriteAt(make([]byte, 10), 0)) }},
		"zero":    {breakL2, func(img *Image) error { return img.WriteZeroes(0, 512) }},
		"discard": {breakL2, func(img *Image) error { return img.Discard(0, 512) }},
		"create":  {breakL2, func(img *Image) error { return errOf(img.CreateSnapshot(t.Context(), "new", nil)) }},
		"goto":    {breakSnapshot, func(img *Image) error { return img.GotoSnapshot(t.Context(), ByName("snapshot")) }},
		"delete":  {breakSnapshot, func(img *Image) error { return img.DeleteSnapshot(t.Context(), ByName("snapshot")) }},
		"flush": {noCount, func(img *Image) error {
			if err := img.Discard(0, 512); err != nil {
				return err
			}
			return img.Flush()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := hostileImage(t, 3)
			test.change(f)
			img, err := Open(f, OpenOptions{})
			must(t, err)
			if err := test.use(img); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("got %v", err)
			}
			if !img.Info().CorruptBit || incompatibleBits(f)&format.IncompatCorrupt == 0 {
				t.Error("the image is not marked")
			}
			if _, err := img.WriteAt([]byte{1}, 30<<10); !errors.Is(err, ErrCorrupt) {
				t.Errorf("a write elsewhere: %v", err)
			}
			if _, err := img.ReadAt(make([]byte, 512), 30<<10); err != nil {
				t.Errorf("a read elsewhere: %v", err)
			}
			_ = img.Close()
			if _, err := Open(f.reopen(), OpenOptions{}); !errors.Is(err, ErrCorrupt) {
				t.Errorf("open again: %v", err)
			}
			if r := repairFile(t, f.reopen(), RepairAll); r.Left.ExitStatus() != 0 {
				t.Errorf("repair: %+v", r)
			}
			img, err = Open(f, OpenOptions{})
			must(t, err)
			must(t, img.Close())
		})
	}
}

// TestCorruptBitOfOtherErrors: neither a failing disk nor damaged content says anything about the metadata.
func TestCorruptBitOfOtherErrors(t *testing.T) {
	for name, test := range map[string]struct {
		change func(f *memFile)
		fault  bool
	}{
		"I/O error":         {func(*memFile) {}, true},
		"compressed stream": {func(f *memFile) { put64(f, l2At(f), format.FlagCompressed|uint64(l1At(f))) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := hostileImage(t, 3)
			test.change(f)
			img, err := Open(f, OpenOptions{})
			must(t, err)
			if test.fault {
				f.failOnce(0, func(k callKind) bool { return k == callRead }, &fs.PathError{Op: "read", Path: "x", Err: os.ErrInvalid})
			}
			if _, err := img.ReadAt(make([]byte, 10), 0); err == nil {
				t.Fatal("no error")
			}
			if img.Info().CorruptBit {
				t.Error("the image is marked corrupt")
			}
			_, err = img.WriteAt([]byte{1}, 30<<10)
			must(t, err)
			must(t, img.Close())
		})
	}
}

package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// sharingFile shares blocks, in the sense that it copies them by itself, and counts how often it is told to.
type sharingFile struct {
	*memFile
	calls int
}

func (f *sharingFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	f.calls++
	if size, err := src.Size(); err != nil || srcOff+n > size { // as the kernel refuses it
		return errors.Join(err, ErrOutOfRange)
	}
	b := make([]byte, n)
	if err := format.ReadPadded(src, b, format.HostOffset(srcOff)); err != nil {
		return err
	}
	_, err := f.WriteAt(b, dstOff)
	return err
}

// sameClone clones the active disk, and checks that the clone is sound and reads as the disk does. It returns how many calls
// that took to share blocks.
func sameClone(t *testing.T, img *Image, size int64) (calls int) {
	t.Helper()
	dst := &sharingFile{memFile: newMemFile("clone")}
	must(t, Clone(t.Context(), dst, img.Active(), size, nil))
	path := tempImage(t)
	dst.save(t, path)
	if q := runQemuCheck(t, path); q.exit != 0 {
		t.Error(q.output)
	}
	r, err := Check(t.Context(), dst.memFile, nil)
	if must(t, err); r.ExitStatus() != 0 {
		t.Errorf("our check: %+v", r)
	}
	clone := openPath(t, path)
	want, got := make([]byte, max(img.Size(), size)), make([]byte, clone.Size())
	_, err = img.ReadAt(want[:img.Size()], 0)
	must(t, err)
	_, err = clone.ReadAt(got, 0)
	must(t, err)
	if i := difference(got, want); i >= 0 {
		t.Errorf("the clone differs at %#x", i)
	}
	must(t, clone.Close())
	return dst.calls
}

// However a guest's writes have scattered its clusters, those that are neighbours in the file are shared together: with
// subclusters, too.
func TestCloneOfScatteredWrites(t *testing.T) {
	for _, extended := range []bool{false, true} {
		f := newMemFile("scattered")
		must(t, Create(t.Context(), f, 64<<20, CreateOptions{ExtendedL2: extended}))
		img, err := Open(f, OpenOptions{})
		must(t, err)
		const writes = 300
		for _, cluster := range rand.New(rand.NewPCG(1, 1)).Perm(64 << 20 / 65536)[:writes] {
			_, err := img.WriteAt(stamp(1, int64(cluster), 4096), int64(cluster)*65536+8192)
			must(t, err)
		}
		if calls := sameClone(t, img, 0); calls == 0 || calls > writes/10 {
			t.Errorf("extended L2 %t: %d writes took %d calls to share", extended, writes, calls)
		}
		must(t, img.Close())
	}
}

// What cannot be taken over as it is: a cluster that is mapped twice, one that the disk's end cuts and whose rest a larger
// clone would show, and one that the file's end cuts.
func TestCloneOfOddClusters(t *testing.T) {
	const size = 4<<16 + format.SectorSize
	f := newMemFile("odd")
	must(t, Create(t.Context(), f, size, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	for _, off := range []int64{4 << 16, 0} { // so that what the disk's end cuts is not what the file's end cuts
		_, err = img.WriteAt(stamp(1, off, size-off), off)
		must(t, err)
	}
	must(t, img.Close())
	f.reopen()
	// The second entry maps what the first does, of which neither is the owner any more.
	entry := func(i int64) int64 { return int64(get64(f, l2At(f)+i*8) & format.OffsetMask) }
	twice, once := entry(0), entry(1)
	put64(f, l2At(f), uint64(twice))
	put64(f, l2At(f)+8, uint64(twice))
	count := func(off int64, n byte) { must(t, write(f, refBlockAt(f)+off>>16*2+1, string([]byte{n}))) }
	count(twice, 2)
	count(once, 0)
	// Behind the end of the disk its last cluster holds something.
	must(t, write(f, entry(4)+format.SectorSize, string(bytes.Repeat([]byte{7}, format.SectorSize))))
	// The file ends within its last cluster.
	must(t, f.Truncate(entry(3)+4096))

	img, err = Open(f, OpenOptions{})
	must(t, err)
	if calls := sameClone(t, img, 16<<16); calls == 0 {
		t.Error("nothing was shared")
	}
	must(t, img.Close())
}

package qcow2

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
)

// fullDisk is a file on a disk that has no block left but for those that the file gives back.
type fullDisk struct {
	*memFile

	mu     sync.Mutex // guards all below
	blocks map[int64]struct{}
	free   int
}

func newFullDisk(f *memFile) *fullDisk {
	d := &fullDisk{memFile: f, blocks: map[int64]struct{}{}}
	for page := range f.content.pages {
		d.blocks[page] = struct{}{}
	}
	return d
}

func (d *fullDisk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var wanted []int64
	for page := off / memPageSize; page <= (off+int64(len(p))-1)/memPageSize; page++ {
		if _, ok := d.blocks[page]; !ok {
			wanted = append(wanted, page)
		}
	}
	if len(wanted) > d.free {
		return 0, ErrNoSpace
	}
	d.free -= len(wanted)
	for _, page := range wanted {
		d.blocks[page] = struct{}{}
	}
	return d.memFile.WriteAt(p, off)
}

// giveBack frees the blocks from first on that end before end.
func (d *fullDisk) giveBack(first, end int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for page := range d.blocks {
		if page >= first && page < end {
			delete(d.blocks, page)
			d.free++
		}
	}
}

func (d *fullDisk) PunchHole(off, n int64) error {
	err := d.memFile.PunchHole(off, n)
	d.giveBack((off+memPageSize-1)/memPageSize, (off+n)/memPageSize)
	return err
}

func (d *fullDisk) Truncate(size int64) error {
	err := d.memFile.Truncate(size)
	d.giveBack((size+memPageSize-1)/memPageSize, 1<<50)
	return err
}

// overwrite makes an image with snapshots, and returns what it holds. Each has some of it for itself.
func overwrite(t *testing.T, f File, cluster int64, snapshots ...string) *observation {
	t.Helper()
	must(t, Create(t.Context(), f, 64*cluster, CreateOptions{ClusterSize: cluster}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	put := func(i int) {
		_, err := img.WriteAt(stamp(i+1, 0, int64(16-2*i)*cluster), int64(i)*cluster)
		must(t, err)
	}
	for i, name := range snapshots {
		put(i)
		_, err = img.CreateSnapshot(t.Context(), name, nil)
		must(t, err)
	}
	put(len(snapshots))
	must(t, img.Flush())
	var seen observation
	must(t, seen.observe(img))
	must(t, img.Close())
	return &seen
}

// A snapshot is deleted from a disk that is full to its last block, of which nobody keeps any: the last of the table, for which
// the header alone is written, and others, for which a table is. Whenever the power is cut, it is there as a whole or gone.
func TestDeleteOnFullDisk(t *testing.T) {
	for i, name := range []string{"one", "two", "three"} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile("full")
			before := overwrite(t, f, 16<<10, "one", "two", "three")
			disk := newFullDisk(f.reopen())
			img, err := Open(disk, OpenOptions{})
			must(t, err)
			if _, err := img.CreateSnapshot(t.Context(), "four", nil); err == nil {
				t.Fatal("the disk is not full")
			}
			log := f.record()
			must(t, img.DeleteSnapshot(t.Context(), ByName(name)))
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("%+v, %v", r, err)
			}
			was := before.state()
			now := was
			now.snaps = slices.Delete(slices.Clone(was.snaps), i, i+1)
			allowed := []crashState{was, now}
			crashes := 0
			for c := range log.crashes(rand.New(rand.NewPCG(1, 1)), func(int) int { return 20 }) {
				crashes++
				if r, err := checkFile(t.Context(), c.file); err != nil || r.Corruptions != 0 {
					t.Fatalf("crash after %d of %d calls (%s): %+v, %v", c.calls, len(log.calls), c.kind, r, err)
				}
				img, err := Open(c.file.clone().disguise(), OpenOptions{})
				must(t, err)
				var got observation
				must(t, got.observe(img))
				if c.calls == len(log.calls) && c.kind == crashWhole {
					allowed = allowed[1:]
				}
				if ok, wrong := matches(&got, allowed); !ok {
					t.Fatalf("crash after %d of %d calls (%s): %q", c.calls, len(log.calls), c.kind, wrong)
				}
			}
			t.Logf("%d crashes of %d calls", crashes, len(log.calls))
		})
	}
}

// Each call of it fails once: the snapshot is there as a whole or gone, and whoever is told so finds it gone.
func TestDeleteOnFullDiskFails(t *testing.T) {
	base := newMemFile("full")
	was := overwrite(t, base, 16<<10, "one", "two").state()
	now := was
	now.snaps = was.snaps[1:]
	for n, happened := 0, true; happened; n++ {
		f := base.clone().reopen()
		img, err := Open(newFullDisk(f), OpenOptions{})
		must(t, err)
		failing := f.failing(n, faults()[0])
		err = img.DeleteSnapshot(t.Context(), ByName("one"))
		f.setFault(nil)
		var failed fileCall
		failed, happened = failing()
		giving := failed.kind == callPunch || failed.kind == callTruncate // back what it does without
		if happened != (err != nil) && !giving {
			t.Fatalf("call %d, %s, failed: %v", n, failed, err)
		}
		if allowed := []crashState{now, was}; err == nil {
			acceptable(t, failed.String(), f.clone(), allowed[:1])
		} else {
			acceptable(t, failed.String(), f.clone(), allowed)
		}
		if err := img.Close(); err != nil && !errors.Is(err, ErrFailed) {
			t.Fatalf("call %d, %s, failed, then Close: %v", n, failed, err)
		}
		acceptable(t, failed.String()+", then Close", f.clone(), []crashState{now, was})
	}
}

// Of a snapshot that has nothing for itself the tables are freed. What it shared may stay counted twice, for there is no room for the
// active disk's new tables; nothing else is wrong.
func TestDeleteOnFullDiskFreesNothing(t *testing.T) {
	f := newMemFile("full")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{ClusterSize: 16 << 10}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	_, err = img.WriteAt(stamp(1, 0, 512<<10), 0)
	must(t, err)
	_, err = img.CreateSnapshot(t.Context(), "one", nil)
	must(t, err)
	must(t, img.Close())
	img, err = Open(newFullDisk(f.reopen()), OpenOptions{})
	must(t, err)
	must(t, img.DeleteSnapshot(t.Context(), ByName("one")))
	var got observation
	must(t, got.observe(img))
	if len(got.snaps) != 0 || difference(got.active[:512<<10], stamp(1, 0, 512<<10)) >= 0 {
		t.Errorf("%d snapshots, or other data", len(got.snaps))
	}
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.Corruptions != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// The same on real file systems: one snapshot after the other goes, and after each the rest is as it was.
func TestDeleteOnFullFileSystem(t *testing.T) {
	for name, fs := range map[string]struct {
		size int64
		mkfs []string
	}{
		"ext4": {32 << 20, []string{"mkfs.ext4", "-q", "-F", "-m", "0"}},
		"xfs":  {320 << 20, []string{"mkfs.xfs", "-q"}},
	} {
		for _, order := range [][]string{{"one", "three", "two"}, {"three", "two", "one"}, {"two", "one", "three"}} {
			t.Run(name+", first "+order[0], func(t *testing.T) {
				dir := testfs.Image(t, name, fs.size, fs.mkfs...)
				path := filepath.Join(dir, "disk")
				open := func(openFile func() (File, error)) File {
					f, err := openFile()
					must(t, err)
					return f
				}
				f := open(func() (File, error) { return CreateFile(path) })
				again := func() File { return open(func() (File, error) { return OpenFile(path, false) }) }
				want := overwrite(t, f, 64<<10, "one", "two", "three").state()
				for _, gone := range order {
					testfs.FillUp(t, filepath.Join(dir, "ballast before "+gone))
					img, err := Open(again(), OpenOptions{})
					must(t, err)
					if _, err := img.CreateSnapshot(t.Context(), "four", nil); !errors.Is(err, ErrNoSpace) {
						t.Fatalf("a snapshot: %v, but the file system is full", err)
					}
					must(t, img.DeleteSnapshot(t.Context(), ByName(gone)))
					want.snaps = slices.DeleteFunc(want.snaps, func(s modelSnapshot) bool { return s.name == gone })
					var got observation
					must(t, got.observe(img))
					if w := want.differs(&got); w != "" {
						t.Errorf("without %s: %s", gone, w)
					}
					must(t, img.Close())
					if r := runQemuCheck(t, path); r.exit != 0 {
						t.Errorf("without %s: qemu-img check exits %d: %s", gone, r.exit, r.output)
					}
				}
			})
		}
	}
}

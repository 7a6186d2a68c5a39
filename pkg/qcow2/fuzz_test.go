package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file fuzzes whole images. An input is the number of a sound image and patches of its metadata, or, with rawSeed,
// all bytes of the file; and what is done to it. Nothing may panic, hang, take memory or calls that the file does not
// justify, or touch anything beyond the file. An image that is clean stays clean, and its content what it has to be.

// rawSeed says that the patches are the file.
const rawSeed = 255

// fuzzImage returns the image that an input means, nil if it means none.
func fuzzImage(seeds []fuzzSeed, seed byte, patches []byte) *memFile {
	if seed == rawSeed {
		if len(patches) > 1<<20 {
			return nil
		}
		return rawFuzzFile(patches)
	}
	return seeds[int(seed)%len(seeds)].patched(patches)
}

// fuzzChanges are ways to damage eight bytes, see patched.
var fuzzChanges = [...][5]byte{{1, 0xff, 0xff, 0xff, 0xff}, {3, 1, 0, 0x80, 0}, {3, 5, 0, 0x80, 0}, {7, 0, 4, 0, 0}, {4, 63, 0, 0, 0}}

// addFuzzInputs adds the seeds as they are, and each with some damage.
func addFuzzInputs(seeds []fuzzSeed, add func(seed byte, patches []byte)) {
	for i := range seeds {
		add(byte(i), nil)
		for region := range min(len(seeds[i].regions), 12) {
			for at := range 4 {
				add(byte(i), append([]byte{byte(region), byte(at), 0}, fuzzChanges[(region+at)%len(fuzzChanges)][:]...))
			}
		}
	}
	for _, s := range seeds[:2] {
		b := make([]byte, s.file.content.size)
		s.file.content.readAt(b, 0)
		add(rawSeed, b)
	}
}

// fuzzLimits returns what an operation on f may cost. L1 tables and caches have the sizes that the format and the
// configuration allow, when the file is as long.
func fuzzLimits(f *memFile) (calls int64, memory uint64) {
	clusters := f.content.size / 512
	return 2000 + 40*clusters, 64<<20 + 64*uint64(f.content.size)
}

// FuzzRead opens an image for reading, reads all there is, lists what it is made of, clones and checks it.
func FuzzRead(f *testing.F) {
	seeds := fuzzSeeds(f)
	addFuzzInputs(seeds, func(seed byte, patches []byte) { f.Add(seed, patches) })
	f.Fuzz(func(t *testing.T, seed byte, patches []byte) {
		file := fuzzImage(seeds, seed, patches)
		if file == nil {
			return
		}
		before := file.clone()
		calls, memory := fuzzLimits(file)
		w := watch(file, 0, 20*calls)
		within(t, 12*memory, func() {
			_, _ = Check(t.Context(), w, nil)
			img, err := Open(w, OpenOptions{ReadOnly: true, L2CacheSize: 4096})
			if err != nil {
				return
			}
			_ = img.Info()
			fuzzReadView(t, img.Active())
			if len(patches)/patchBytes%4 == 1 { // it takes its time
				fuzzClone(t, img.Active())
			}
			for _, s := range img.Snapshots()[:min(len(img.Snapshots()), 8)] {
				if v, err := img.OpenSnapshot(ByID(s.ID)); err == nil {
					fuzzReadView(t, v)
					_ = v.Close()
				}
			}
			_ = img.Close()
		})
		if v := w.violated.Load(); v != nil {
			t.Error(*v)
		}
		if !sameContent(before, file) {
			t.Error("reading changed the file")
		}
	})
}

// fuzzReadView reads what there is, as far as it is small.
func fuzzReadView(t *testing.T, v *View) {
	n := min(v.Size(), 128<<10)
	p := make([]byte, n)
	_, _ = v.ReadAt(p, 0)
	_, _ = v.ReadAt(p, v.Size()-n)
	at, extents := int64(0), 0
	err := v.Extents(0, func(e Extent) error {
		if e.Offset != at || e.Length <= 0 {
			t.Errorf("extent %+v, want one at %#x", e, at)
		}
		at += e.Length
		if extents++; extents < 64 && e.Kind >= Data {
			_, _ = v.ReadAt(p[:min(e.Length, int64(len(p)))], e.Offset)
		}
		return nil
	})
	if err == nil && at != v.Size() {
		t.Errorf("the extents end at %#x of %#x", at, v.Size())
	}
}

// fuzzClone clones what is not too large.
func fuzzClone(t *testing.T, v *View) {
	data := int64(0)
	tooMuch := errors.New("too much")
	err := v.Extents(0, func(e Extent) error {
		if e.Kind >= Data {
			data += e.Length
		}
		if data > 4<<20 {
			return tooMuch
		}
		return nil
	})
	if err == nil {
		_ = Clone(t.Context(), newMemFile("clone"), v, 0, nil)
	}
}

// FuzzChange opens an image for writing and lets a guest and the snapshot operations at it. One that our checker finds
// clean is compared with a model.
func FuzzChange(f *testing.F) {
	seeds := fuzzSeeds(f)
	// Writes, a snapshot, a write, zeros, a flush, goto, a new size, an open, a delete.
	ops := []byte{0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 4, 4, 1, 0, 0, 2, 3, 0, 0, 0, 5, 0, 0, 0, 7, 1, 0, 0, 8, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 1}
	addFuzzInputs(seeds, func(seed byte, patches []byte) { f.Add(seed, patches, ops) })
	f.Fuzz(func(t *testing.T, seed byte, patches, ops []byte) {
		file := fuzzImage(seeds, seed, patches)
		if file == nil {
			return
		}
		if len(patches)/patchBytes%4 != 3 { // else nobody vouches for it, and most damage is found at the opening
			file.disguise()
		}
		ops = ops[:min(len(ops), 16*fuzzOpBytes)]
		calls, memory := fuzzLimits(file)
		turns := int64(len(ops)/fuzzOpBytes + 4)
		w := watch(file, maxGap+32<<20, turns*calls)
		within(t, uint64(turns)*memory, func() {
			z := newFuzzed(t, w)
			for ; len(ops) >= fuzzOpBytes && z.img != nil; ops = ops[fuzzOpBytes:] {
				z.step(ops[0], int64(binary.LittleEndian.Uint16(ops[1:])), int64(ops[3]))
			}
			z.end()
		})
		if v := w.violated.Load(); v != nil {
			t.Error(*v)
		}
	})
}

// fuzzed is an image that a fuzzer works on, with its model if it was clean.
type fuzzed struct {
	t     *testing.T
	file  *watchedFile
	img   *Image // nil: it cannot be opened
	clean bool
	h     *history // the model, and how it is compared
	count int
}

// fuzzOpBytes is the length of an operation in a fuzzer's input.
const fuzzOpBytes = 4

// maxFuzzDisk is the largest disk that a model is made of, in bytes.
const maxFuzzDisk = 4 << 20

func newFuzzed(t *testing.T, file *watchedFile) *fuzzed {
	z := &fuzzed{t: t, file: file}
	z.clean = soundFuzzImage(t, file.memFile)
	if z.open(); z.img == nil {
		return z
	}
	z.h = &history{t: t, img: z.img, g: z.img.g}
	z.clean = z.clean && z.model()
	return z
}

// soundFuzzImage tells whether an image has to stay clean. Counts of clusters behind the end of the file, which a check
// does not see, become leaks when it grows, and so do the clusters of bitmaps with the first write.
func soundFuzzImage(t *testing.T, f *memFile) bool {
	longer := f.clone()
	longer.content.truncate(f.content.size + maxGap + 32<<20) // as far as the targets let it grow
	for _, f := range []*memFile{f, longer} {
		if r, err := Check(t.Context(), f, nil); err != nil || r.ExitStatus() != 0 {
			return false
		}
	}
	h, err := format.ReadHeader(f, format.DecodeHeader)
	return err == nil && h.Autoclear&format.AutoclearBitmaps == 0
}

func (z *fuzzed) open() {
	z.file.reopen()
	img, err := Open(z.file, OpenOptions{L2CacheSize: 4096})
	if err != nil {
		img = nil
	}
	if z.img != nil && z.clean && err != nil {
		z.t.Fatalf("a clean image does not open again: %v", err)
	}
	z.img = img
	if z.h != nil {
		z.h.img = img
	}
}

// model reads all there is; it returns false if that fails, or is too much.
func (z *fuzzed) model() bool {
	read := func(v *View) *sparse {
		if v.Size() > maxFuzzDisk {
			return nil
		}
		p := make([]byte, v.Size())
		if _, err := v.ReadAt(p, 0); err != nil {
			return nil
		}
		s := newSparse()
		s.writeAt(p, 0)
		s.size = v.Size()
		return s
	}
	if z.h.model.active = read(z.img.Active()); z.h.model.active == nil {
		return false
	}
	names := map[string]bool{}
	for _, s := range z.img.Snapshots() {
		v, err := z.img.OpenSnapshot(ByName(s.Name))
		if err != nil || names[s.Name] || len(names) > 8 {
			return false
		}
		names[s.Name] = true
		content := read(v)
		_ = v.Close()
		if content == nil {
			return false
		}
		z.h.model.snaps = append(z.h.model.snaps, modelSnapshot{s.Name, s.ID, content})
	}
	return true
}

// did tells whether an operation succeeded. On a clean image only limits are an excuse.
func (z *fuzzed) did(what string, err error, excuses ...error) bool {
	z.t.Helper()
	if err != nil && z.clean && !slices.ContainsFunc(append(excuses, ErrLimit), func(e error) bool { return errors.Is(err, e) }) {
		z.t.Fatalf("%s of a clean image: %v", what, err)
	}
	return err == nil && z.clean
}

// step makes one operation, at unit in size/256ths of the disk or a snapshot's number.
func (z *fuzzed) step(op byte, where, length int64) {
	z.t.Helper()
	z.count++
	img, m := z.img, &z.h.model
	size := img.Size()
	off := int64(0)
	if size > 0 {
		off = min(where*97, (size-1)/65536*where+where) % size
	}
	n := min(length*131, size-off)
	snapshot := "absent"
	if ss := img.Snapshots(); len(ss) > 0 {
		snapshot = ss[where%int64(len(ss))].Name
	}
	at := slices.IndexFunc(m.snaps, func(s modelSnapshot) bool { return s.name == snapshot })
	switch op % 12 {
	case 0, 9:
		p := stamp(z.count, off, n)
		if _, err := img.WriteAt(p, off); z.did("write", err) {
			m.active.writeAt(p, off)
		}
	case 1:
		if z.did("zero", img.WriteZeroes(off, n)) {
			m.active.zero(off, n)
		}
	case 2:
		n = min(length<<10, size-off)
		if z.did("discard", img.Discard(off, n)) {
			m.active.zero(off, n)
		}
	case 3:
		z.did("flush", img.Flush())
	case 4:
		name := fmt.Sprint("new ", z.count)
		if s, err := img.CreateSnapshot(z.t.Context(), name, nil); z.did("snapshot", err) {
			m.snaps = append(m.snaps, modelSnapshot{name, s.ID, m.active.clone()})
		}
	case 5:
		if z.did("goto", img.GotoSnapshot(z.t.Context(), ByName(snapshot)), ErrNotFound) {
			m.active = m.snaps[at].content.clone()
		}
	case 6:
		if z.did("delete", img.DeleteSnapshot(z.t.Context(), ByName(snapshot)), ErrNotFound) {
			m.snaps = slices.Delete(m.snaps, at, at+1)
		}
	case 7:
		if z.did("resize", img.Resize(z.t.Context(), size+where*512), ErrUnsupported) {
			m.active.size = wholeSectors(size + where*512)
		}
	case 8:
		z.did("close", img.Close())
		z.checkClean()
		z.open()
	case 10:
		_, _ = img.ReadAt(make([]byte, n), off)
		_, err := img.Check(z.t.Context(), nil)
		z.did("check", err)
	case 11:
		if z.did("drop", img.DropActive(z.t.Context())) {
			m.active = newSparse()
			m.active.size = size
		}
	}
	if z.clean && m.active.size > 16*maxFuzzDisk {
		z.clean = false // too large to compare
	}
}

// end closes the image and looks at what it has become.
func (z *fuzzed) end() {
	z.t.Helper()
	if z.img == nil {
		return
	}
	if z.clean {
		z.h.verify()
	}
	z.did("close", z.img.Close())
	z.checkClean()
	if z.open(); z.img != nil {
		z.did("close again", z.img.Close())
	}
	z.checkClean()
}

// checkClean demands that an image that was clean is.
func (z *fuzzed) checkClean() {
	z.t.Helper()
	r, err := Check(z.t.Context(), z.file.clone(), nil)
	if z.clean && (err != nil || r.ExitStatus() != 0) {
		z.t.Fatalf("a clean image has become %+v, %v", r, err)
	}
}

// FuzzRepair repairs an image. What succeeds leaves no corruption, and all that RepairAll can mend is mended, so that the
// image can be used; one that was clean is left alone.
func FuzzRepair(f *testing.F) {
	seeds := fuzzSeeds(f)
	addFuzzInputs(seeds, func(seed byte, patches []byte) {
		f.Add(seed, patches, true)
		if len(patches) == 0 {
			f.Add(seed, patches, false)
		}
	})
	f.Fuzz(func(t *testing.T, seed byte, patches []byte, all bool) {
		file := fuzzImage(seeds, seed, patches)
		if file == nil {
			return
		}
		before := file.clone()
		calls, memory := fuzzLimits(file)
		w := watch(file, maxGap+32<<20, 20*calls)
		kind := RepairLeaks
		if all {
			kind = RepairAll
		}
		within(t, 12*memory, func() {
			r, err := Repair(t.Context(), w, kind, nil)
			switch {
			case w.violated.Load() != nil || err != nil:
			case r.FoundErr == nil && r.Found.ExitStatus() == 0 && r.Mended == nil && !sameContent(before, file):
				t.Error("a clean image was changed")
			case r.Left.ExitStatus() == 3 || all && r.Left.ExitStatus() != 0:
				t.Errorf("left: %+v, found: %+v, %v, mended %q", r.Left, r.Found, r.FoundErr, r.Mended)
			case all:
				if img, err := Open(w, OpenOptions{}); err == nil {
					_ = img.Close()
				} else if errors.Is(err, ErrCorrupt) {
					t.Errorf("after the repair: %v; found: %+v, %v, mended %q", err, r.Found, r.FoundErr, r.Mended)
				}
			}
		})
		if v := w.violated.Load(); v != nil {
			t.Error(*v)
		}
	})
}

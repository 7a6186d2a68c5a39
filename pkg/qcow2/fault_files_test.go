package qcow2

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// This file lets calls of the file fail while an image is written from scratch, and while one is repaired.

// TestFaultsOfNewImages fails the calls of the file that an image is created in, or that a clone is written to: no image is
// left in it.
func TestFaultsOfNewImages(t *testing.T) {
	base := faultBases(t)[2]
	create := func(p Preallocation) func(*memFile) error {
		return func(f *memFile) error {
			return Create(t.Context(), f, 100*format.SectorSize, CreateOptions{ClusterSize: 512, Preallocation: p})
		}
	}
	for name, write := range map[string]func(dst *memFile) error{
		"create":                create(PreallocationOff),
		"preallocated metadata": create(PreallocationMetadata),
		"preallocated":          create(PreallocationFull),
		"clone": func(dst *memFile) error {
			img, err := Open(base.file.clone(), OpenOptions{})
			must(t, err)
			defer img.Close()
			return Clone(t.Context(), dst, img.Active(), 0, nil)
		},
	} {
		for _, how := range faults() {
			n := 0
			for ; ; n++ {
				dst := newMemFile(faultFile)
				failing := dst.failing(n, how)
				err := write(dst)
				failed, happened := failing()
				if !happened {
					must(t, err)
					break
				}
				if !errors.Is(err, how.err) || !strings.Contains(err.Error(), faultFile) {
					t.Errorf("%s: call %d, %s, failed (%s): it returns %v", name, n, failed, how.name, err)
				}
				if dst.content.size != 0 && failed.kind != callSize { // of what could not be asked for its size nothing is touched
					t.Errorf("%s: call %d, %s, failed (%s): something is left", name, n, failed, how.name)
				}
			}
			if n == 0 && how.match(callWrite) {
				t.Errorf("%s: no call was made to fail", name)
			}
		}
	}
}

// TestFaultsOfRepair fails the calls of repairs. What could be read still can, and the next repair goes through.
func TestFaultsOfRepair(t *testing.T) {
	leaky := newFaultBase(t, "leaks", crashConfigs()[0])
	total := 0
	for _, c := range []struct {
		name string
		kind RepairKind
		file *memFile
	}{
		{"leaks", RepairLeaks, leakyFile(t, crashConfigs()[0])},
		{"all of what only leaks", RepairAll, leakyFile(t, crashConfigs()[2])},
		{"counts", RepairAll, damagedFile(leaky.file, func(f *memFile) { put64(f, refBlockAt(f)+8, 0) })},
		{"refcount table", RepairAll, damagedFile(leaky.file, func(f *memFile) { put64(f, refTableAt(f), 3) })},
		{"mapping", RepairAll, damagedFile(leaky.file, func(f *memFile) { put64(f, l2At(f), get64(f, snapshotL2At(f)+8)) })},
		{"snapshot table", RepairAll, damagedFile(leaky.file, func(f *memFile) { put64(f, snapshotTableAt(f), 1<<40) })},
		{"dirty bit", RepairAll, damagedFile(leaky.file, func(f *memFile) { put64(f, 72, format.IncompatDirty) })},
	} {
		before := readable(t, c.file)
		for _, how := range faults() {
			n := 0
			for ; ; n++ {
				f := c.file.clone()
				failing := f.failing(n, how)
				_, err := Repair(t.Context(), f, c.kind, nil)
				failed, happened := failing()
				f.setFault(nil)
				what := fmt.Sprintf("%s: call %d, %s, failed (%s): %v", c.name, n, failed, how.name, err)
				if !happened {
					must(t, err)
					break
				}
				if err == nil && (failed.kind != callRead || !how.short) { // what it had read ahead may have been enough
					t.Errorf("%s: the error is lost", what)
				}
				if err != nil && (!errors.Is(err, how.err) || !strings.Contains(err.Error(), faultFile)) {
					t.Errorf("%s: it does not say what failed, or where", what)
				}
				if diff := before.changed(t, f); diff != "" {
					t.Errorf("%s: %s", what, diff)
				}
				if r := repairFile(t, f, RepairAll); r.Left.ExitStatus() != 0 {
					t.Errorf("%s: repaired again: %+v", what, r.Left)
				}
				if diff := before.changed(t, f); diff != "" {
					t.Errorf("%s: repaired again: %s", what, diff)
				}
			}
			if n == 0 && how.match(callWrite) {
				t.Errorf("%s: no call was made to fail", c.name)
			}
			total += n
		}
	}
	t.Logf("%d fault points: every call of each", total)
}

func damagedFile(sound *memFile, damage func(*memFile)) *memFile {
	f := sound.clone()
	damage(f)
	return f
}

// leakyFile returns what a crash leaves of an image that guests have just used.
func leakyFile(t testing.TB, p crashParams) *memFile {
	t.Helper()
	return newLeakyBase(t, p).file
}

// newLeakyBase is newFaultBase with an image that nobody has closed.
func newLeakyBase(t testing.TB, p crashParams) faultBase {
	t.Helper()
	h := newCrashHistory(t, 1, p)
	h.write(0, h.img.Size()/2&^(format.SectorSize-1))
	h.flush()
	f := h.file.clone()
	f.name = faultFile
	must(t, h.img.Close())
	if r, err := checkFile(t.Context(), f); err != nil || r.Leaks == 0 {
		t.Fatalf("no leaks to begin with: %+v, %v", r, err)
	}
	return faultBase{name: "leaks", file: f, g: h.g, state: h.state, leaks: true}
}

package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// repairFile runs our repair on whatever f holds.
func repairFile(t testing.TB, f *memFile, kind RepairKind) RepairResult {
	t.Helper()
	r, err := Repair(t.Context(), f, kind, nil)
	if err != nil {
		t.Fatalf("repair: %v", err)
	}
	return r
}

// content is what can be read of an image: by the name of a snapshot, "" for the active disk, and guest cluster.
type content map[string]map[int64][]byte

// readable reads what there is to read; what fails is left out.
func readable(t testing.TB, f *memFile) content {
	t.Helper()
	c := content{}
	img, err := Open(f.clone(), OpenOptions{ReadOnly: true})
	if err != nil {
		return c
	}
	defer img.Close()
	read := func(name string, v *View) {
		clusters := map[int64][]byte{}
		for off := int64(0); off < v.Size(); off += img.ClusterSize() {
			b := make([]byte, min(img.ClusterSize(), v.Size()-off))
			if _, err := v.ReadAt(b, off); err == nil {
				clusters[off] = b
			}
		}
		c[name] = clusters
	}
	read("", img.Active())
	for _, s := range img.Snapshots() {
		if v, err := img.OpenSnapshot(ByID(s.ID)); err == nil && v.Size() < 64<<20 {
			read("snapshot "+s.ID, v)
			must(t, v.Close())
		}
	}
	return c
}

func (c content) clusters() (n int64) {
	for _, clusters := range c {
		n += int64(len(clusters))
	}
	return n
}

// changed says what f reads differently.
func (c content) changed(t testing.TB, f *memFile) string {
	t.Helper()
	now := readable(t, f)
	for name, clusters := range c {
		for off, b := range clusters {
			if !bytes.Equal(now[name][off], b) {
				return fmt.Sprintf("%q reads otherwise at %#x", name, off)
			}
		}
	}
	return ""
}

// TestRepairCrash crashes repairs at every call: what could be read still can, and the next repair goes through.
func TestRepairCrash(t *testing.T) {
	images := qemuImages(t)
	for _, name := range []string{"v2", "4K", "compressed", "subclusters", "4 bit counts"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := tempImage(t)
			images[name](path)
			sound := loadMemFile(t, path)
			rng := rand.New(rand.NewPCG(4, uint64(len(name))))
			tried := 0
			for range 4 {
				broken := sound.clone()
				what := damage(t, broken, rng)
				before := readable(t, broken)
				log := broken.record()
				repairFile(t, broken, RepairAll)
				for c := range log.crashes(rng, func(int) int { return 2 }) {
					tried++
					if diff := before.changed(t, c.file); diff != "" {
						t.Fatalf("%s, crash after %d calls (%s): %s", what, c.calls, c.kind, diff)
					}
					if r := repairFile(t, c.file, RepairAll); r.Left.ExitStatus() != 0 {
						t.Fatalf("%s, crash after %d calls (%s): %+v", what, c.calls, c.kind, r.Left)
					}
				}
			}
			t.Logf("%d states", tried)
		})
	}
}

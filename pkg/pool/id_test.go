package pool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestNewID(t *testing.T) {
	p, other := newPool(t), newPool(t)
	long := strings.Repeat("a", 200)
	for name, prefix := range map[string]string{
		"pvc-7f1c0c35-0d0e-4f6c-9a33-2a8d8c2f5a11": "pvc-7f1c0c35-0d0e-4f6c-9a33-2a8d8c2f5a11",
		"Data_Disk.1":         "data-disk-1",
		"../../etc/passwd":    "etc-passwd",
		"":                    "volume",
		"///":                 "volume",
		"-x-":                 "x",
		"ä":                   "volume",
		"a\x00b\n":            "a-b",
		long:                  long[:40],
		long[:39] + "-b":      long[:39],
		"v-00000000-00000000": "v-00000000-00000000",
	} {
		id := p.NewID(name)
		if want := prefix + "-" + p.UUID()[:8] + "-"; !strings.HasPrefix(id, want) || len(id) != len(want)+8 {
			t.Errorf("NewID(%q) = %s, want %s and 8 digits", name, id, want)
		}
		if !ValidID(id) || !p.Owns(id) || other.Owns(id) {
			t.Errorf("%s: valid %t, ours %t, another's %t", id, ValidID(id), p.Owns(id), other.Owns(id))
		}
		if p.NewID(name) == id {
			t.Errorf("%s was made twice", id)
		}
	}
}

func hostileIDs(p *Pool) []string {
	id := p.NewID("v")
	return []string{
		"", ".", "..", "/", "v", "../" + id, id + "/..", id + "/", "/" + id, "./" + id, id + "\x00", id + "\n", " " + id,
		strings.ToUpper(id), "V" + id[1:], id[:len(id)-1], id[:len(id)-1] + "g", id + "0", strings.Replace(id, "-", "_", 1),
		strings.Repeat("a", 41) + id[1:], "-" + id, "--" + id[1:], id[1:], "-00000000-00000000", "ä" + id[1:],
		"..-00000000-00000000", "a/b-00000000-00000000", "v-0000000/-00000000", "v-00000000-../../..",
		strings.Repeat("../", 1000), id + "@snapshot", "%2e%2e-00000000-00000000",
	}
}

// The zero ID, which no parsing has made, leads to no file, not to the directory of all volumes.
func TestZeroIDIsNoVolume(t *testing.T) {
	p := newPool(t)
	create(t, p, "v")
	root, err := p.enter()
	must(t, err)
	defer root.Close()
	for _, part := range []string{volumesDir, creatingDir, removingDir} {
		if _, err := root.Lstat(ID{}.in(part)); err == nil {
			t.Errorf("in %s there is something", part)
		}
	}
	if d, err := p.openParsed(ID{}); err == nil {
		t.Errorf("opened %s", d.Name())
	}
	if _, err := os.Lstat(p.imagePath(ID{})); err == nil {
		t.Error("it has an image")
	}
}

func TestHostileIDs(t *testing.T) {
	p := newPool(t)
	create(t, p, "v")
	for _, id := range hostileIDs(p) {
		if ValidID(id) || p.Owns(id) {
			t.Errorf("%q is taken for an ID", id)
		}
		if path := p.ImagePath(id); path != "" {
			t.Errorf("the image of %q is %s", id, path)
		}
		_, _, marked := p.Marked(id, Frozen)
		for call, err := range map[string]error{
			"Volume":    errOf(p.Volume(id)),
			"Lock":      errOf(p.Lock(id)),
			"Snapshots": errOf(p.Snapshots(id)),
			"Create":    p.Create(t.Context(), Volume{ID: id, Name: "v"}, fillQCOW2),
			"Mark":      p.Mark(id, Frozen, nil),
			"Unmark":    p.Unmark(id, Frozen),
			"Marked":    marked,
		} {
			want(t, call+" "+id, err, ErrBadID)
		}
	}
}

func TestIDsOfAnyNameAreSafe(t *testing.T) {
	p, other := newPool(t), newPool(t)
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.OneOf(rapid.String(), rapid.StringMatching(`[a-zA-Z0-9._/-]{0,60}`)).Draw(t, "name")
		id := p.NewID(name)
		idName, pool, ok := splitID(id)
		switch {
		case !ok, !ValidID(id), !p.Owns(id), other.Owns(id):
			t.Fatalf("%q is not recognised", id)
		case idName != safeName(name) || safeName(idName) != idName:
			t.Fatalf("the name in %q is %q", id, idName)
		case pool != p.UUID()[:8]:
			t.Fatalf("the pool in %q is %q", id, pool)
		case len(id) > 58:
			t.Fatalf("%q has %d bytes", id, len(id))
		}
	})
}

func TestValidIDsAreSafe(t *testing.T) {
	p := newPool(t)
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.OneOf(
			rapid.String(),
			rapid.StringMatching(`[a-z0-9./-]{0,42}-[0-9a-g]{8}-[0-9a-f]{8}`),
		).Draw(t, "id")
		if !ValidID(id) {
			return
		}
		if len(id) > 58 || strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || id[0] == '-' {
			t.Fatalf("%q is taken for an ID", id)
		}
		if got := filepath.Join(p.Dir(), volumesDir, id, imageFile); p.ImagePath(id) != got || filepath.Base(filepath.Dir(got)) != id {
			t.Fatalf("the image of %q is %s", id, p.ImagePath(id))
		}
	})
}

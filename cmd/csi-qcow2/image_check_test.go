package main

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckStatus compares the exit status with that of qemu-img check.
func TestCheckStatus(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		damage func(t *testing.T, image *os.File)
		status int
		says   string
	}{
		"clean":      {func(*testing.T, *os.File) {}, 0, "The image is clean."},
		"leak":       {leak, 3, "1 clusters are leaked"},
		"no count":   {func(t *testing.T, f *os.File) { setCount(t, f, 0, 0) }, 2, "The image is corrupt"},
		"no image":   {func(t *testing.T, f *os.File) { writeAt(t, f, []byte("none"), 0) }, 1, "not a qcow2 image"},
		"no L1":      {func(t *testing.T, f *os.File) { writeAt(t, f, make([]byte, 8), 40) }, 2, "the header"},
		"huge table": {func(t *testing.T, f *os.File) { writeAt(t, f, []byte{0xff, 0xff, 0xff, 0xff}, 36) }, 1, "L1"},
	} {
		t.Run(name, func(t *testing.T) {
			image := damagedImage(t, tt.damage)
			r := run(t, "image", "check", image)
			if r.status != tt.status || !strings.Contains(r.stdout+r.stderr, tt.says) {
				t.Errorf("exit status %d, want %d and %q: %s%s", r.status, tt.status, tt.says, r.stdout, r.stderr)
			}
			check := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", image)
			if _ = check.Run(); check.ProcessState.ExitCode() != r.status {
				t.Errorf("exit status %d, that of qemu-img is %d", r.status, check.ProcessState.ExitCode())
			}
		})
	}
}

// leak adds a cluster that nothing refers to.
func leak(t *testing.T, f *os.File) {
	t.Helper()
	stat, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	cluster := (stat.Size() + 64<<10 - 1) / (64 << 10)
	if err := f.Truncate((cluster + 1) * 64 << 10); err != nil {
		t.Fatal(err)
	}
	setCount(t, f, cluster, 1)
}

// setCount sets the reference count of a cluster of a small image made by us.
func setCount(t *testing.T, f *os.File, cluster int64, count uint16) {
	t.Helper()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], 64<<10); err != nil { // the refcount table
		t.Fatal(err)
	}
	writeAt(t, f, binary.BigEndian.AppendUint16(nil, count), int64(binary.BigEndian.Uint64(entry[:]))+2*cluster)
}

func writeAt(t *testing.T, f *os.File, data []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func TestCheckJSON(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	qemuIO(t, image, "write -P 1 0 1M")
	var theirs, ours map[string]any
	decode(t, qemu(t, "qemu-img", "check", "--output=json", image), &theirs)
	decode(t, mustRun(t, "image", "check", "-o", "json", image), &ours)
	contains(t, "check", theirs, ours)
}

// TestCheckRepairs repairs as far as it is told, and ends with the status that qemu-img gives to the result.
func TestCheckRepairs(t *testing.T) {
	t.Parallel()
	corrupt := func(t *testing.T, f *os.File) { setCount(t, f, 0, 0) }
	for name, tt := range map[string]struct {
		damage func(t *testing.T, image *os.File)
		flag   string
		status int
		says   string
	}{
		"clean":             {func(*testing.T, *os.File) {}, "all", 0, "The image is clean."},
		"leak":              {leak, "leaks", 0, "refcount 1 became 0"},
		"leak, all":         {leak, "all", 0, "refcount 1 became 0"},
		"corrupt":           {corrupt, "all", 0, "written anew"},
		"corrupt, leaks":    {corrupt, "leaks", 2, "The image is corrupt"},
		"no refcount table": {func(t *testing.T, f *os.File) { writeAt(t, f, make([]byte, 4), 56) }, "all", 0, "written anew"},
		"no start":          {func(t *testing.T, f *os.File) { writeAt(t, f, make([]byte, 8), 40) }, "all", 1, "the L1 table is at offset 0"},
		"bad flag":          {func(*testing.T, *os.File) {}, "some", 1, "all or leaks"},
	} {
		t.Run(name, func(t *testing.T) {
			image := damagedImage(t, tt.damage)
			r := run(t, "image", "check", "--repair", tt.flag, image)
			if r.status != tt.status || !strings.Contains(r.stdout+r.stderr, tt.says) {
				t.Errorf("exit status %d, want %d and %q: %s%s", r.status, tt.status, tt.says, r.stdout, r.stderr)
			}
			check := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", image)
			if _ = check.Run(); tt.status != 1 && check.ProcessState.ExitCode() != tt.status {
				t.Errorf("exit status %d, that of qemu-img is %d afterwards", r.status, check.ProcessState.ExitCode())
			}
			if tt.status == 0 {
				qemuIO(t, image, "read -P 1 0 1M")
			}
		})
	}
}

func TestCheckRepairJSON(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	leak(t, f)
	f.Close()
	var report map[string]any
	decode(t, mustRun(t, "image", "check", "--repair", "leaks", "-o", "json", image), &report)
	if report["leaks-fixed"] != 1.0 || report["leaks"] != nil {
		t.Errorf("%v", report)
	}
}

// damagedImage makes an image that holds a little, and damages it.
func damagedImage(t *testing.T, damage func(*testing.T, *os.File)) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	qemuIO(t, image, "write -P 1 0 1M")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	damage(t, f)
	return image
}

// TestCheckSays: the verdict comes first, what is alike is one line, and -q leaves it to the exit status.
func TestCheckSays(t *testing.T) {
	t.Parallel()
	image := damagedImage(t, func(t *testing.T, f *os.File) {
		for range 20 {
			leak(t, f)
		}
	})
	r := run(t, "image", "check", image)
	lines := strings.Split(r.stdout, "\n")
	if r.status != 3 || len(lines) != 5 || lines[0] != "20 clusters are leaked: they cost space and do no harm." ||
		!strings.HasPrefix(lines[1], "leak: cluster ") || !strings.Contains(lines[1], "and 18 more like it, up to: leak: cluster ") {
		t.Errorf("exit status %d:\n%s", r.status, r.stdout)
	}
	if r := run(t, "image", "check", "-q", image); r.status != 3 || r.stdout+r.stderr != "" {
		t.Errorf("-q: %+v", r)
	}
	r = run(t, "image", "check", "--repair", "leaks", image)
	if !strings.HasPrefix(r.stdout, "The image is clean. Repaired: 0 errors, 20 leaked clusters.\n") {
		t.Errorf("repaired: %+v", r)
	}
}

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestImportForeign: files of other formats, as QEMU and others make them, are refused with what to do, and taken as they are
// when they are said to be raw.
func TestImportForeign(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	must(t, os.WriteFile(raw, bytes.Repeat([]byte{1}, 1<<20), 0o600))
	files := map[string]string{}
	for _, format := range []string{"qcow", "vmdk", "vhdx", "vpc", "vdi", "qed", "parallels"} {
		files[format] = filepath.Join(dir, format)
		qemu(t, "qemu-img", "convert", "-f", "raw", "-O", format, raw, files[format])
	}
	flat := filepath.Join(dir, "flat.vmdk")
	qemu(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", flat, "1M")
	fixed := filepath.Join(dir, "fixed")
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size", raw, fixed)
	luks := filepath.Join(dir, "luks")
	must(t, os.WriteFile(luks, append([]byte("LUKS\xba\xbe\x00\x01"), make([]byte, 4096)...), 0o600)) // as cryptsetup begins
	packed := filepath.Join(dir, "packed")
	out, err := exec.CommandContext(t.Context(), "gzip", "-c", raw).Output()
	must(t, err)
	must(t, os.WriteFile(packed, out, 0o600))
	tar := filepath.Join(dir, "tar")
	qemu(t, "tar", "-C", dir, "-cf", tar, "raw")

	refuse := func(path, format string) {
		image := filepath.Join(t.TempDir(), "x.qcow2")
		r := run(t, "image", "import", path, image)
		if r.status != 1 || !strings.Contains(r.stderr, "format "+format) || !strings.Contains(r.stderr, "--raw") {
			t.Errorf("%s: %+v", path, r)
		}
		if _, err := os.Lstat(image); err == nil {
			t.Errorf("%s: there is an image", path)
		}
		mustRun(t, "image", "import", "--raw", path, image)
		qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, image)
		verify(t, image)
	}
	for format, path := range files {
		refuse(path, format)
	}
	for path, format := range map[string]string{flat: "vmdk", fixed: "vpc", luks: "luks", packed: "gzip", tar: "tar"} {
		refuse(path, format)
	}

	// Raw disks are taken as they are: with a partition table, a file system, nothing, hardly anything.
	gpt, ext4, xfs := filepath.Join(dir, "gpt"), filepath.Join(dir, "ext4"), filepath.Join(dir, "xfs")
	must(t, os.WriteFile(gpt, append(make([]byte, 510), "\x55\xaaEFI PART"...), 0o600))
	for path, size := range map[string]int64{ext4: 8 << 20, xfs: 300 << 20} {
		must(t, os.WriteFile(path, nil, 0o600))
		must(t, os.Truncate(path, size))
	}
	qemu(t, "mkfs.ext4", "-q", ext4)
	qemu(t, "mkfs.xfs", "-q", xfs)
	short, empty := filepath.Join(dir, "short"), filepath.Join(dir, "empty")
	must(t, os.WriteFile(short, []byte("QF"), 0o600))
	must(t, os.WriteFile(empty, nil, 0o600))
	for _, path := range []string{raw, gpt, ext4, xfs, short, empty} {
		mustRun(t, "image", "import", path, filepath.Join(t.TempDir(), "x.qcow2"))
	}
}

package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// rawFile makes a sparse file: data and holes of random lengths, written zeros among them.
func rawFile(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := rand.New(rand.NewPCG(1, 2))
	noise := rand.NewChaCha8([32]byte{})
	for off := int64(0); off < size; off += r.Int64N(3 << 20) {
		data := make([]byte, min(size-off, r.Int64N(200<<10)))
		if r.IntN(4) > 0 {
			_, _ = noise.Read(data)
		}
		if _, err := f.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// occupied returns how many bytes a file has on the disk.
func occupied(t *testing.T, path string) int64 {
	t.Helper()
	stat, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return stat.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestImportExport(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := filepath.Join(dir, "in.raw")
	rawFile(t, raw, 40<<20+12345)
	content, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, flags := range [][]string{nil, {"--cluster-size", "512"}, {"--cluster-size", "2M", "--version", "2"}} {
		image, out := filepath.Join(t.TempDir(), "x.qcow2"), filepath.Join(t.TempDir(), "out.raw")
		mustRun(t, append([]string{"image", "import", raw, image}, flags...)...)
		verify(t, image)
		qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)

		mustRun(t, "image", "export", image, out)
		qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, out)
		if got, most := occupied(t, out), occupied(t, raw)+1<<20; got > most {
			t.Errorf("%v: the raw file occupies %d bytes, the original %d", flags, got, most)
		}
		streamed := mustRun(t, "image", "export", image, "-")
		if want := append(bytes.Clone(content), make([]byte, 512-12345%512)...); streamed != string(want) {
			t.Errorf("%v: export to standard output differs (%d bytes, want %d)", flags, len(streamed), len(want))
		}
	}
}

// TestImportSparse checks that zeros of a raw file, written or not, take no space in the image.
func TestImportSparse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "in.raw"), filepath.Join(dir, "x.qcow2")
	if err := os.WriteFile(raw, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(raw, 1<<40); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "image", "import", raw, image)
	if got := occupied(t, image); got > 1<<20 {
		t.Errorf("the image of nothing but zeros occupies %d bytes", got)
	}
	verify(t, image)
}

func TestExportSnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image, out := filepath.Join(dir, "x.qcow2"), filepath.Join(dir, "out.raw")
	mustRun(t, "image", "create", image, "8M")
	qemuIO(t, image, "write -P 1 1M 64K", "write -c -P 2 3M 64K")
	mustRun(t, "image", "snapshot", "create", image, "s")
	qemuIO(t, image, "write -P 3 1M 64K")
	mustRun(t, "image", "resize", image, "16M")
	mustRun(t, "image", "export", image, out, "--snapshot", "s")
	want := make([]byte, 8<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{1}, 64<<10))
	copy(want[3<<20:], bytes.Repeat([]byte{2}, 64<<10))
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the snapshot's content differs (%d bytes, %v)", len(got), err)
	}
}

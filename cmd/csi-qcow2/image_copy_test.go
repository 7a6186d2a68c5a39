package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
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

// TestImportStream: what comes on standard input, of a length that nobody knows before, becomes an image.
func TestImportStream(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "in.raw"), filepath.Join(dir, "x.qcow2")
	rawFile(t, raw, 40<<20+12345)
	content, err := os.ReadFile(raw)
	must(t, err)
	mustRunWith(t, string(content), "image", "import", "-", image)
	qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
	verify(t, image)
	mustRunWith(t, "", "image", "import", "-", filepath.Join(dir, "empty"))
	verify(t, filepath.Join(dir, "empty"))
	for stream, want := range map[string]string{"QFI\xfb\x00\x00\x00\x03" + strings.Repeat("x", 5000): "save it", "vhdxfile": "--raw"} {
		none := filepath.Join(dir, "none")
		if r := runWith(t, stream, "image", "import", "-", none); r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("%q: %+v", want, r)
		}
		if _, err := os.Lstat(none); err == nil {
			t.Errorf("%q: there is an image", want)
		}
		mustRunWith(t, stream, "image", "import", "--raw", "-", none)
		must(t, os.Remove(none))
	}
}

// TestImportImage: a qcow2 image of QEMU's is read as what it is, whatever its version and compression.
func TestImportImage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := filepath.Join(dir, "in.raw")
	rawFile(t, raw, 20<<20)
	for name, options := range map[string][]string{
		"version 2": {"-o", "compat=0.10"}, "deflate": {"-c"}, "zstd": {"-c", "-o", "compression_type=zstd"},
		"subclusters": {"-o", "extended_l2=on,cluster_size=128k"},
	} {
		source, image := filepath.Join(dir, name), filepath.Join(dir, name+".qcow2")
		qemu(t, "qemu-img", append(append([]string{"convert", "-O", "qcow2"}, options...), raw, source)...)
		qemu(t, "qemu-img", "snapshot", "-c", "s", source)
		mustRun(t, "image", "import", source, image, "--cluster-size", "32K")
		qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
		var info imageInfo
		decode(t, mustRun(t, "image", "info", "-o", "json", image), &info)
		if len(info.Snapshots) != 0 || info.ClusterSize != 32<<10 {
			t.Errorf("%s: %+v", name, info)
		}
		verify(t, image)
	}
	based, image := filepath.Join(dir, "based"), filepath.Join(dir, "x.qcow2")
	qemu(t, "qemu-img", "create", "-f", "qcow2", "-b", raw, "-F", "raw", based)
	if r := run(t, "image", "import", based, image); r.status != 1 || !strings.Contains(r.stderr, "qemu-img convert") {
		t.Errorf("with a backing file: %+v", r)
	}
}

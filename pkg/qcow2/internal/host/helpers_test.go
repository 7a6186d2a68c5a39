package host

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// errOf drops the result of a call that is to fail.
func errOf[T any](_ T, err error) error { return err }

func qemuImg(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// stamp returns n bytes, a multiple of 8, that tell who wrote them, and where.
func stamp(writer int, off, n int64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(writer)<<48|uint64(off)|1), int(n/8))
}

// openDirectFile makes an empty file, which is removed when the test ends. Its blocks may be larger than they need be.
func openDirectFile(t *testing.T, block int64) *DirectFile {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "direct") // a temporary directory may be in memory
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "file")
	f, err := CreateFile(path)
	must(t, err)
	must(t, f.Close())
	f, err = OpenDirectFile(path)
	must(t, err)
	d, ok := f.(*DirectFile)
	if !ok {
		t.Fatalf("%T: no direct I/O", f)
	}
	d.Block = max(d.Block, block)
	return d
}

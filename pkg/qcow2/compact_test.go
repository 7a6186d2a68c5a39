package qcow2

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestPunchFree: clusters that others have freed and left as they are go back to the file system, and nothing else does.
func TestPunchFree(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.qcow2")
	qemu := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	blocks := func() int64 {
		t.Helper()
		st, err := os.Stat(path)
		must(t, err)
		return st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	qemu("qemu-img", "create", "-f", "qcow2", path, "64M")
	qemu("qemu-io", "-c", "write -P 1 0 8M", path)
	qemu("qemu-io", "-c", "write -P 2 16M 8M", "-c", "write -P 3 32M 1M", path)
	qemu("qemu-io", "--image-opts", "driver=qcow2,discard=unmap,pass-discard-request=off,file.filename="+path, "-c", "discard 0 8M")
	f, err := OpenFile(path, false)
	must(t, err)
	img, err := Open(f, OpenOptions{})
	must(t, err)
	before := blocks()
	must(t, img.PunchFree())
	if after := blocks(); after > before-7<<20 {
		t.Errorf("it occupies %d bytes, before it were %d", after, before)
	}
	must(t, img.Close())
	qemu("qemu-img", "check", path)
	qemu("qemu-io", "-c", "read -P 2 16M 8M", "-c", "read -P 3 32M 1M", "-c", "read -P 0 0 16M", "-c", "read -P 0 33M 31M", path)
}

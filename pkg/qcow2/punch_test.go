package qcow2

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestTakeWhilePunching: while the free clusters of a refcount block are being punched, guests get clusters of the same
// block behind the end of the file, not far away in the next one; and those are not punched.
func TestTakeWhilePunching(t *testing.T) {
	f := newMemFile("punching")
	must(t, Create(t.Context(), f, 64<<20, CreateOptions{}))
	img, err := Open(f, OpenOptions{})
	must(t, err)
	a := img.alloc
	end := a.g.ClusterBehind(a.fileEnd())
	a.unsafe, a.unsafeEnd = map[int64]struct{}{0: {}}, end
	got, err := a.take(3)
	must(t, err)
	for _, r := range got {
		if r.First < end || r.End() > end+a.g.Counted(0, a.g.BlockCounts/2) {
			t.Errorf("clusters %d to %d were taken, the file ends at %d", r.First, r.End(), end)
		}
	}
	for _, r := range a.freeIn(0) {
		if r.End() > end {
			t.Errorf("clusters up to %d are to be punched, those from %d on can be taken", r.End(), end)
		}
	}
	a.reopen(0, nil)
	must(t, a.release(got))
	must(t, img.Close())
	if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

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
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := img.PunchFree(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	must(t, img.PunchFree(t.Context()))
	if after := blocks(); after > before-7<<20 {
		t.Errorf("it occupies %d bytes, before it were %d", after, before)
	}
	must(t, img.Close())
	qemu("qemu-img", "check", path)
	qemu("qemu-io", "-c", "read -P 2 16M 8M", "-c", "read -P 3 32M 1M", "-c", "read -P 0 0 16M", "-c", "read -P 0 33M 31M", path)
}

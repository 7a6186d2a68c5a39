package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestCloneOfAttachedVolume(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	const size = 256 * mib
	id := r.newVolume("a", size)
	device := r.attach(id)
	fillDevice(t, device, 200*mib, mib, 1)
	_, err := r.client.CreateSnapshot(ctx, id, "s1", nil)
	must(t, err)
	fillDevice(t, device, 200*mib, mib, 2)
	w := startWriter(t, device, 100*mib)
	w.awaitProgress(t)

	old, present, larger := filepath.Join(r.dir, "old"), filepath.Join(r.dir, "present"), filepath.Join(r.dir, "larger")
	must(t, r.client.Clone(ctx, id, "s1", old, 0))
	flushed := w.flushed.Load()
	must(t, r.client.Clone(ctx, id, "", present, 0))
	must(t, r.client.Clone(ctx, id, "s1", larger, 2*size))

	wantImage(t, old, 200*mib, mib, 1)
	wantImage(t, old, 0, mib, 0)
	wantImage(t, present, 200*mib, mib, 2)
	for block := range flushed {
		wantImage(t, present, block*writerBlock, writerBlock, byte(block+1))
	}
	wantImage(t, larger, 200*mib, mib, 1)
	wantImage(t, larger, size+mib, mib, 0)
	for _, path := range []string{old, present, larger} {
		checkImage(t, path)
	}
	list, err := r.client.ListSnapshots(ctx, id)
	must(t, err)
	if len(list) != 1 {
		t.Errorf("snapshots after the clones: %+v", list)
	}
	w.stop()
	w.done.Wait()
	w.check(t, r.attach(id))
	r.detach(id)
	if out := run(t, "qemu-img", "snapshot", "-l", r.pool.ImagePath(id)); strings.Contains(out, worker.ReservedPrefix) {
		t.Errorf("a clone's snapshot is left:\n%s", out)
	}
	wantNoParts(t, r)
}

func wantNoParts(t *testing.T, r *rig) {
	t.Helper()
	parts, err := filepath.Glob(filepath.Join(r.dir, "*"+worker.PartSuffix))
	must(t, err)
	if len(parts) > 0 {
		t.Errorf("left: %v", parts)
	}
}

func TestCloneRefusals(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	id := r.newVolume("a", 8*mib)
	r.attach(id)
	target := filepath.Join(r.dir, "target")
	outside := t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(r.dir, "link")))
	for _, bad := range []string{
		"", "target", outside + "/x", r.dir + "/../x", r.dir + "/link/x", r.dir + "/nowhere/x", r.dir + "x",
	} {
		wantErr(t, r.client.Clone(ctx, id, "", bad, 0), ErrInvalid)
	}
	wantErr(t, r.client.Clone(ctx, id, "nothing", target, 0), qcow2.ErrNotFound)
	if err := r.client.Clone(ctx, id, "", target, mib); err == nil {
		t.Error("cloned to a smaller size")
	}
	must(t, os.WriteFile(target, []byte("mine"), 0o600))
	wantErr(t, r.client.Clone(ctx, id, "", target, 0), qcow2.ErrExists)
	got, err := os.ReadFile(target)
	must(t, err)
	if string(got) != "mine" {
		t.Errorf("the existing target is now %q", got)
	}
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Errorf("written outside the pool: %v", entries)
	}
	wantNoParts(t, r)
}

// A repeated call joins the clone that runs, also after its first caller has left.
func TestCloneJoins(t *testing.T) {
	r := newRig(t)
	id := r.newFilledVolume("a")
	target := filepath.Join(r.dir, "target")
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { left <- r.client.Clone(ctx, id, "", target, 0) }()
	running := awaitClone(t, target)
	cancel()
	if err := <-left; err != nil {
		wantErr(t, err, context.Canceled)
	}
	var callers sync.WaitGroup
	var good atomic.Int32
	for range 3 {
		callers.Go(func() {
			err := r.client.Clone(t.Context(), id, "", target, 0)
			switch {
			case err == nil:
				good.Add(1)
			case !errors.Is(err, qcow2.ErrExists): // for those who come after the success was told
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if good.Load() == 0 {
		t.Error("nobody was told that the clone is made")
	}
	whole, err := os.Stat(target)
	must(t, err)
	if !os.SameFile(running, whole) {
		t.Error("the clone was begun again")
	}
	wantErr(t, r.client.Clone(t.Context(), id, "", target, 0), qcow2.ErrExists)
	wantImage(t, target, 0, mib, 1)
	wantImage(t, target, 56*mib, mib, 57)
	checkImage(t, target)
}

// newFilledVolume makes a volume, attaches it and fills 64 MiB of it.
func (r *rig) newFilledVolume(name string) string {
	r.t.Helper()
	id := r.newVolume(name, 256*mib)
	device := r.attach(id)
	for off := int64(0); off < 64*mib; off += 8 * mib {
		fillDevice(r.t, device, off, 8*mib, byte(off/mib+1))
	}
	return id
}

// awaitClone waits until a clone to target runs, and returns its file.
func awaitClone(t *testing.T, target string) (file os.FileInfo) {
	t.Helper()
	eventually(t, "the clone runs", func() bool {
		for _, path := range []string{target + worker.PartSuffix, target} {
			var err error
			if file, err = os.Stat(path); err == nil {
				return true
			}
		}
		return false
	})
	return file
}

// Detach does not wait for a clone, it ends it, and nothing of it stays.
func TestDetachDuringClone(t *testing.T) {
	r := newRig(t)
	id := r.newFilledVolume("a")
	target := filepath.Join(r.dir, "target")
	done := make(chan error)
	go func() { done <- r.client.Clone(t.Context(), id, "", target, 0) }()
	awaitClone(t, target)
	r.detach(id)
	if err := <-done; err != nil {
		t.Logf("the clone ended with: %v", err)
		wantErr(t, err, ErrUnavailable)
		if _, err := os.Stat(target); err == nil {
			t.Error("a half file is left")
		}
	}
	wantNoParts(t, r)
	if out := run(t, "qemu-img", "snapshot", "-l", r.pool.ImagePath(id)); strings.Contains(out, worker.ReservedPrefix) {
		t.Errorf("a clone's snapshot is left:\n%s", out)
	}
}

// The worker dies during a clone.
func TestKillWorkerDuringClone(t *testing.T) {
	r := newRig(t)
	id := r.newFilledVolume("a")
	target := filepath.Join(r.dir, "target")
	pid := r.find(id).WorkerPID
	done := make(chan error)
	go func() { done <- r.client.Clone(t.Context(), id, "", target, 0) }()
	awaitClone(t, target)
	must(t, unix.Kill(pid, unix.SIGKILL))
	if err := <-done; err != nil {
		wantErr(t, err, ErrUnavailable)
		wantNoParts(t, r)
	}
	wantDevice(t, r.attach(id), 0, mib, 1)
	if err := r.client.Clone(t.Context(), id, "", target, 0); err != nil {
		wantErr(t, err, qcow2.ErrExists)
	}
	wantImage(t, target, 0, mib, 1)
}

// A clone that was answered is there after a power cut.
func TestCloneIsDurable(t *testing.T) {
	r := newDiskRig(t, 512*mib)
	ctx := testContext(t)
	id := r.newVolume("a", 8*mib)
	fillDevice(t, r.attach(id), 0, mib, 7)
	_, err := r.client.CreateSnapshot(ctx, id, "s", nil)
	must(t, err)
	target := filepath.Join(r.dir, "clone.qcow2")
	must(t, r.client.Clone(ctx, id, "s", target, 0))
	run(t, "xfs_io", "-x", "-c", "shutdown", r.dir) // what is in the log's memory is lost
	r.eventually("it is detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	r.stop()
	must(t, unix.Unmount(r.dir, 0))
	run(t, "mount", "-o", "loop", r.disk, r.dir)
	r.start()
	f, err := qcow2.OpenFile(target, true)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	got := make([]byte, mib)
	_, err = img.ReadAt(got, 0)
	must(t, err)
	for i, b := range got {
		if b != 7 {
			t.Fatalf("byte %d of the clone is %#x", i, b)
		}
	}
	must(t, os.Remove(target))
}

package engine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// newDiskRig makes a pool on an XFS file system of its own, of a size in bytes, and starts an engine on it.
func newDiskRig(t *testing.T, size int64) *rig {
	t.Helper()
	r := newIdleRig(t)
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, size))
	run(t, "mkfs.xfs", "-q", disk)
	run(t, "mount", "-o", "loop", disk, r.dir)
	t.Cleanup(func() {
		// Before the rig's own clean-up, which then finds nothing: workers hold files of the pool.
		r.stop()
		r.checkVolumes()
		r.pool, r.engine = nil, nil
		if err := unix.Unmount(r.dir, 0); err != nil {
			t.Errorf("unmount the pool: %v", err)
			_ = unix.Unmount(r.dir, unix.MNT_DETACH)
		}
	})
	must(t, pool.Init(r.dir))
	var err error
	r.pool, err = pool.Open(r.dir)
	must(t, err)
	r.start()
	r.disk = disk
	return r
}

// newWrittenRig is newDiskRig with a volume that is being written.
func newWrittenRig(t *testing.T) (r *rig, id, device string, w *flushingWriter) {
	t.Helper()
	const size = 256 * mib
	r = newDiskRig(t, 512*mib)
	id = r.newVolume("a", size)
	device = r.attach(id)
	w = startWriter(t, device, size)
	w.awaitProgress(t)
	return r, id, device, w
}

// The pool's disk fails while a volume is written: its user gets errors, the failure is listed, and the volume
// can be detached; when the disk is back, everything that was flushed is there.
func TestPoolDiskFails(t *testing.T) {
	r, id, device, w := newWrittenRig(t)
	flushed := w.flushed.Load() // XFS may acknowledge a sync in the very instant of its shutdown, and lose it (Linux 6.18)
	run(t, "xfs_io", "-x", "-c", "shutdown", r.dir)
	w.done.Wait()
	if !errors.Is(w.err, unix.EIO) {
		t.Errorf("the writer ended with %v", w.err)
	}
	// A write that fails harms nothing but itself. After a failed sync nothing can be promised any more.
	f := openDirect(t, device)
	wantErr(t, f.Sync(), unix.EIO)
	must(t, f.Close())
	a := r.find(id)
	if a == nil || a.Failure == "" || a.Device != device || a.WorkerPID == 0 {
		t.Fatalf("listed as %+v", a)
	}
	t.Logf("failure: %s", a.Failure)
	wantErr(t, r.client.Detach(testContext(t), id), qcow2.ErrFailed) // says once that the image was not closed in order
	r.detach(id)
	r.stop()

	must(t, unix.Unmount(r.dir, 0))
	run(t, "mount", "-o", "loop", r.disk, r.dir)
	r.start()
	w.flushed.Store(flushed)
	w.check(t, r.attach(id))
	r.detach(id)
}

// The pool's disk fails, or somebody takes its file system away: as soon as no volume is attached the engine keeps neither
// busy, and it serves the pool when it comes back on another device.
func TestPoolLost(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, r *rig){
		"failed": func(t *testing.T, r *rig) {
			run(t, "xfs_io", "-x", "-c", "shutdown", r.dir)
			r.eventually("the file system can be unmounted", func() bool { return unix.Unmount(r.dir, 0) == nil })
		},
		"unmounted": func(t *testing.T, r *rig) { must(t, unix.Unmount(r.dir, unix.MNT_DETACH)) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newDiskRig(t, 512*mib)
			id := r.newVolume("a", mib)
			fillDevice(t, r.attach(id), 0, 4096, 7)
			r.detach(id)
			lose(t, r)
			r.eventually("the disk is free", func() bool { return run(t, "losetup", "--associated", r.disk) == "" })
			run(t, "mount", "-o", "loop", r.disk, r.dir)
			var device string
			r.eventually("the pool is served again", func() bool {
				d, err := r.client.Attach(testContext(t), id)
				device = d.Path
				return err == nil
			})
			wantDevice(t, device, 0, 4096, 7)
			r.detach(id)
		})
	}
}

// While volumes of a lost pool are attached, it is kept, and it is said which.
func TestPoolLostInUse(t *testing.T) {
	r, id, _, w := newWrittenRig(t)
	run(t, "xfs_io", "-x", "-c", "shutdown", r.dir)
	w.done.Wait()
	r.eventually("it says what uses the pool", func() bool {
		_, err := r.client.Probe(testContext(t))
		return errors.Is(err, ErrUnavailable) && strings.Contains(err.Error(), id)
	})
	wantErr(t, unix.Unmount(r.dir, 0), unix.EBUSY)
	r.eventually("it is detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	r.eventually("the file system can be unmounted", func() bool { return unix.Unmount(r.dir, 0) == nil })
	run(t, "mount", "-o", "loop", r.disk, r.dir)
	r.eventually("the pool is served again", func() bool {
		_, err := r.client.Attach(testContext(t), id)
		return err == nil
	})
	r.detach(id)
}

// The pool's disk hangs: its users wait, which is reported, and go on when it answers again.
func TestPoolDiskHangs(t *testing.T) {
	t.Parallel() // it waits, most of the time
	r, id, device, w := newWrittenRig(t)
	dir, err := os.Open(r.dir)
	must(t, err)
	defer dir.Close()
	must(t, unix.IoctlSetInt(int(dir.Fd()), fiFreeze, 0))
	thaw := sync.OnceValue(func() error { return unix.IoctlSetInt(int(dir.Fd()), fiThaw, 0) })
	defer func() { _ = thaw() }()
	r.eventually("the volume is listed as stalled", func() bool {
		a := r.find(id)
		return a != nil && a.State == Stalled && a.Failure != ""
	})
	must(t, thaw())
	r.eventually("it is well", func() bool { return r.find(id).State == Served })
	w.awaitProgress(t)
	w.stop()
	w.done.Wait()
	must(t, w.err)
	w.check(t, device)
	r.detach(id)
}

// A full pool: writes fail with ENOSPC, and go on when there is room again.
func TestPoolDiskFull(t *testing.T) {
	const size = 1024 * mib
	r := newDiskRig(t, 320*mib)
	id := r.newVolume("a", size)
	device := r.attach(id)
	ballast, err := os.Create(filepath.Join(r.dir, "ballast"))
	must(t, err)
	must(t, unix.Fallocate(int(ballast.Fd()), 0, 0, 64*mib))
	must(t, ballast.Close())
	f, buf := openDirect(t, device), aligned(mib)
	var off int64
	for off = 0; err == nil && off < size; off += mib {
		for i := range buf {
			buf[i] = byte(off/mib + 1)
		}
		_, err = f.WriteAt(buf, off)
	}
	wantErr(t, err, unix.ENOSPC)
	full := off - mib
	t.Logf("full after %d MiB", full/mib)
	_, err = r.client.CreateSnapshot(testContext(t), id, "s", nil)
	t.Logf("a snapshot of the full pool: %v", err)
	if err != nil { // a small one may find room in what the image has reserved
		wantErr(t, err, qcow2.ErrNoSpace)
	}

	must(t, os.Remove(ballast.Name()))
	_, err = f.WriteAt(buf, full)
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())
	must(t, r.client.DeleteSnapshot(testContext(t), id, "s"))
	_, err = r.client.CreateSnapshot(testContext(t), id, "s", nil)
	must(t, err)
	if a := r.find(id); a.Failure != "" {
		t.Errorf("failure: %s", a.Failure)
	}
	for off := int64(0); off <= full; off += mib {
		wantDevice(t, device, off, mib, byte(off/mib+1))
	}
	r.detach(id)
}

// A full pool beside others: all who write meet ENOSPC and nothing else, and what they discard makes room for them.
func TestPoolDiskFullForMany(t *testing.T) {
	const size = 1024 * mib
	r := newDiskRig(t, 320*mib)
	id := r.newVolume("a", size)
	device := r.attach(id)
	out, err := exec.CommandContext(testContext(t), "fio", "--name=fill", "--filename="+device, "--rw=randwrite", "--bs=64k",
		"--direct=1", "--ioengine=libaio", "--iodepth=16").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "No space left on device") || strings.Contains(string(out), "Input/output error") {
		t.Errorf("a disk larger than its pool was written: %v\n%s", err, out)
	}
	f := openDirect(t, device)
	must(t, ioctlRange(f, unix.BLKDISCARD, &[2]uint64{0, size / 2}))
	must(t, f.Sync())
	must(t, f.Close())
	run(t, "fio", "--name=again", "--filename="+device, "--rw=randwrite", "--bs=4k", fmt.Sprintf("--size=%d", 32*mib),
		"--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_state_save=0")
	if a := r.find(id); a.Failure != "" {
		t.Errorf("failure: %s", a.Failure)
	}
	r.detach(id)
}

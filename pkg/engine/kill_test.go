package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// flushingWriter writes blocks to a device, one after the other with a flush behind each, until an error.
type flushingWriter struct {
	flushed atomic.Int64 // blocks from 0 on that are surely there
	done    sync.WaitGroup
	err     error // why it ended; read after done
	ending  atomic.Bool
}

// stop makes it end.
func (w *flushingWriter) stop() { w.ending.Store(true) }

const writerBlock = 4096

// startWriter writes block i full of byte(i+1).
func startWriter(t *testing.T, device string, size int64) *flushingWriter {
	t.Helper()
	w := &flushingWriter{}
	t.Cleanup(w.stop) // it meets an error at the latest when the engine ends
	f := openDirect(t, device)
	buf := aligned(writerBlock)
	w.done.Go(func() {
		defer f.Close()
		for block := int64(0); w.err == nil && !w.ending.Load(); block++ {
			if (block+1)*writerBlock > size {
				w.err = errors.New("the device is full")
				return
			}
			for i := range buf {
				buf[i] = byte(block + 1)
			}
			if _, w.err = f.WriteAt(buf, block*writerBlock); w.err == nil {
				if w.err = f.Sync(); w.err == nil {
					w.flushed.Store(block + 1)
				}
			}
		}
	})
	return w
}

// check fails unless everything that was flushed is on the device.
func (w *flushingWriter) check(t *testing.T, device string) {
	t.Helper()
	for block := range w.flushed.Load() {
		wantDevice(t, device, block*writerBlock, writerBlock, byte(block+1))
	}
}

func (w *flushingWriter) awaitProgress(t *testing.T) {
	t.Helper()
	from := w.flushed.Load()
	eventually(t, "writer flushes 50 more blocks", func() bool { return w.flushed.Load() >= from+50 })
}

// awaitReplaced waits until another worker than pid serves a volume.
func (r *rig) awaitReplaced(id string, pid int) {
	r.t.Helper()
	r.eventually("another worker", func() bool {
		a := r.find(id)
		return a != nil && a.Failure == "" && a.WorkerPID != 0 && a.WorkerPID != pid
	})
}

// Also an engine that is its own holder replaces a worker.
func TestKillWorker(t *testing.T) {
	r := newRig(t)
	const size = 256 * mib
	id, neighbour := r.newVolume("a", size), r.newVolume("neighbour", mib)
	device, other := r.attach(id), r.attach(neighbour)
	w := startWriter(t, device, size)
	w.awaitProgress(t)
	pid, otherPID := r.find(id).WorkerPID, r.find(neighbour).WorkerPID
	must(t, unix.Kill(pid, unix.SIGKILL))
	w.awaitProgress(t)
	r.awaitReplaced(id, pid)
	if again := r.attach(id); again != device {
		t.Errorf("%s is %s now", device, again)
	}
	if r.find(neighbour).WorkerPID != otherPID {
		t.Error("the neighbour's worker was replaced, too")
	}
	fillDevice(t, other, 0, 4096, 9)
	w.stop()
	w.done.Wait()
	must(t, w.err)
	w.check(t, device)
	t.Logf("%d flushed blocks are there", w.flushed.Load())
}

// lose makes a volume lose its worker for good: no other can start until release is called.
func (r *rig) lose(id string) (release func()) {
	r.t.Helper()
	pid := r.find(id).WorkerPID
	must(r.t, r.engine.cmd.Process.Signal(unix.SIGSTOP))
	must(r.t, unix.Kill(pid, unix.SIGKILL))
	var lease *pool.Lease
	r.eventually("the worker is dead", func() bool {
		var err error
		lease, err = r.pool.Lock(id)
		return err == nil
	})
	must(r.t, r.engine.cmd.Process.Signal(unix.SIGCONT))
	return sync.OnceFunc(func() { must(r.t, lease.Unlock()) })
}

// What a dead worker had reserved is given back beside the users of the volume, and so is what guests had given up.
func TestReclaimAfterKill(t *testing.T) {
	r := newRig(t)
	const size = 64 * mib
	id := r.newVolume("a", size)
	device := r.attach(id)
	fillDevice(t, device, 0, 8*mib, 1)
	_, err := r.client.CreateSnapshot(testContext(t), id, "s", nil)
	must(t, err)
	fillDevice(t, device, 0, mib, 2)
	release := r.lose(id)
	r.kill()
	if leaks(t, r.pool.ImagePath(id)) == 0 {
		t.Fatal("the dead worker left no leaks")
	}
	release()
	r.start()

	device = r.attach(id)
	fillDevice(t, device, 2*mib, mib, 3)
	_, err = r.client.CreateSnapshot(testContext(t), id, "t", nil)
	must(t, err)
	must(t, r.client.DeleteSnapshot(testContext(t), id, "s"))
	r.eventually("the leaks are reclaimed", func() bool {
		r.attach(id)
		r.detach(id) // marks the volume as clean if the search has ended
		_, clean, err := r.pool.Marked(id, pool.Clean)
		must(t, err)
		return clean
	})
	if n := leaks(t, r.pool.ImagePath(id)); n != 0 {
		t.Errorf("%d leaks are left", n)
	}
	device = r.attach(id)
	wantDevice(t, device, 0, mib, 2)
	wantDevice(t, device, mib, mib, 1)
	wantDevice(t, device, 2*mib, mib, 3)
	wantDevice(t, device, 3*mib, 5*mib, 1)
}

// leaks counts them in an image that nobody writes.
func leaks(t *testing.T, path string) int64 {
	t.Helper()
	f, err := qcow2.OpenFile(path, true)
	must(t, err)
	defer f.Close()
	result, err := qcow2.Check(t.Context(), f, nil)
	must(t, err)
	if result.Corruptions != 0 {
		t.Errorf("check %s: %q", path, result.Problems)
	}
	return result.Leaks
}

// A volume whose worker cannot start fails in the end: its users get errors, its neighbours do not. It is attached anew
// while the dead device is mounted.
func TestIOTimeout(t *testing.T) {
	r := newHeldRig(t, "--io-timeout", "300ms")
	id, neighbour := r.newVolume("a", 64*mib), r.newVolume("neighbour", mib)
	device, other := r.attach(id), r.attach(neighbour)
	run(t, "mkfs.ext4", "-q", device)
	dir := mount(t, device, "ext4")
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("synced"), 0o600))
	unix.Sync()
	release := r.lose(id)
	defer release()
	_, err := openDirect(t, device).ReadAt(aligned(4096), 32*mib) // waits
	wantErr(t, err, unix.EIO)
	fillDevice(t, other, 0, 4096, 9)
	r.eventually("the failure is listed", func() bool { a := r.find(id); return a != nil && a.Failure != "" })
	t.Logf("failure: %s", r.find(id).Failure)
	r.eventually("it has failed", func() bool {
		_, err := r.client.CreateSnapshot(testContext(t), id, "s", nil)
		return errors.Is(err, ErrNotAttached)
	})
	wantErr(t, r.client.Detach(testContext(t), id), ErrInUse)
	release()

	second := r.attach(id)
	if second == device {
		t.Fatalf("%s again, which is still mounted", device)
	}
	again := mount(t, second, "ext4")
	got, err := os.ReadFile(filepath.Join(again, "file"))
	must(t, err)
	if string(got) != "synced" {
		t.Errorf("read %q", got)
	}
	must(t, unix.Unmount(again, 0))
	must(t, unix.Unmount(dir, unix.MNT_DETACH))
	r.detach(id)
}

// A failed volume that nobody attaches again is detached.
func TestDetachOfFailedVolume(t *testing.T) {
	r := newHeldRig(t, "--io-timeout", "100ms")
	id := r.newVolume("a", mib)
	r.attach(id)
	release := r.lose(id)
	defer release()
	r.eventually("detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	if a := r.find(id); a != nil {
		t.Errorf("still listed: %+v", a)
	}
}

func TestKillSupervisor(t *testing.T) {
	r := newRig(t)
	const size = 256 * mib
	busy, idle := r.newVolume("busy", size), r.newVolume("idle", size)
	device := r.attach(busy)
	fillDevice(t, r.attach(idle), 0, mib, 3)
	workers := []int{r.find(busy).WorkerPID, r.find(idle).WorkerPID}
	w := startWriter(t, device, size)
	w.awaitProgress(t)
	r.kill()
	w.done.Wait()
	if !errors.Is(w.err, unix.EIO) {
		t.Errorf("the writer ended with %v", w.err)
	}
	for _, pid := range workers {
		r.eventually("the worker ends", func() bool { return unix.Kill(pid, 0) != nil })
	}
	r.start()
	if a := r.find(busy); a == nil || a.State != Failed || a.Device != device { // its users still have the device's node
		t.Errorf("listed: %+v", a)
	}
	w.check(t, r.attach(busy))
	wantDevice(t, r.attach(idle), 0, mib, 3)
}

// Engines are started at once after the death of another, whose workers may still be ending.
func TestKillSupervisorRepeatedly(t *testing.T) {
	r := newRig(t)
	const volumes = 3
	var ids []string
	for i := range volumes {
		ids = append(ids, r.newVolume(fmt.Sprint(i), 64*mib))
	}
	for round := range 4 {
		for _, id := range ids {
			device := r.attach(id)
			if round > 0 {
				wantDevice(t, device, 0, mib, byte(round))
			}
			fillDevice(t, device, 0, mib, byte(round+1))
		}
		r.kill()
		r.start()
	}
}

// orphan kills the engine, and stands in for a worker of it that has not ended: it holds the volume and
// its device until release is called.
func (r *rig) orphan(id, device string) (release func()) {
	r.t.Helper()
	f := openDirect(r.t, device)
	r.kill()
	var lease *pool.Lease
	r.eventually("the real worker ends", func() bool {
		var err error
		lease, err = r.pool.Lock(id)
		return err == nil
	})
	must(r.t, os.Remove(r.socket))
	return sync.OnceFunc(func() {
		must(r.t, f.Close())
		must(r.t, lease.Unlock())
	})
}

// An engine that starts waits for the workers of a dead one.
func TestOrphanEnds(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", 8*mib)
	device := r.attach(id)
	fillDevice(t, device, 0, mib, 1)
	release := r.orphan(id, device)
	defer release()
	r.launch()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 50 {
		<-tick.C
		if _, err := os.Stat(r.socket); err == nil {
			t.Fatal("the engine did not wait")
		}
	}
	release()
	r.awaitProbe(nil)
	if a := r.find(id); a == nil || a.State != Failed {
		t.Errorf("listed as %+v", a)
	}
	wantDevice(t, r.attach(id), 0, mib, 1)
}

// A worker of a dead engine that does not end keeps its volume, and nothing else.
func TestOrphanDoesNotEnd(t *testing.T) {
	r := newRig(t)
	id, other := r.newVolume("a", 8*mib), r.newVolume("other", 8*mib)
	device := r.attach(id)
	fillDevice(t, device, 0, mib, 1)
	r.attach(other)
	release := r.orphan(id, device)
	defer release()
	r.start("--orphan-patience", "100ms")
	if a := r.find(id); a == nil || a.Failure == "" {
		t.Errorf("listed as %+v", a)
	}
	_, err := r.client.Attach(testContext(t), id)
	wantErr(t, err, pool.ErrInUse)
	r.attach(other)
	release()
	wantDevice(t, r.attach(id), 0, mib, 1)
}

// A dead device that is still mounted is listed by the next engine.
func TestKillSupervisorOfMountedVolume(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", 64*mib)
	device := r.attach(id)
	run(t, "mkfs.ext4", "-q", device)
	dir := mount(t, device, "ext4")
	r.kill()
	r.start()
	if a := r.find(id); a == nil || a.Failure == "" || a.Device != device {
		t.Fatalf("listed as %+v", a)
	}
	wantErr(t, r.client.Detach(testContext(t), id), ErrInUse)
	must(t, unix.Unmount(dir, unix.MNT_DETACH))
	r.eventually("detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	if a := r.find(id); a != nil {
		t.Fatalf("listed as %+v", a)
	}
	r.attach(id)
}

// SIGTERM detaches what is free, and aborts what is in use.
func TestStop(t *testing.T) {
	r := newRig(t)
	const size = 256 * mib
	busy, free := r.newVolume("busy", size), r.newVolume("free", size)
	device := r.attach(busy)
	fillDevice(t, r.attach(free), 0, mib, 3)
	w := startWriter(t, device, size)
	w.awaitProgress(t)
	r.stop()
	w.done.Wait()
	if !errors.Is(w.err, unix.EIO) {
		t.Errorf("the writer ended with %v", w.err)
	}
	wantImage(t, r.pool.ImagePath(free), 0, mib, 3)
	r.start()
	w.check(t, r.attach(busy))
}

// A device that is given up ends for its users at once, though a worker that hangs still has its descriptors.
func TestDiscardOfHungWorker(t *testing.T) {
	r := newHeldRig(t)
	id := r.newVolume("a", 8*mib)
	f := openDirect(t, r.attach(id))
	pid := r.stopWorker(id)
	r.eventually("all of it has stopped", func() bool {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		must(t, err)
		return !slices.ContainsFunc(threads, func(e os.DirEntry) bool { return threadState(pid, e.Name()) != "T" })
	})
	resume := sync.OnceFunc(func() { _ = unix.Kill(pid, unix.SIGCONT) })
	defer resume()
	read := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(aligned(4096), 0)
		read <- err
	}()
	must(t, worker.Discard(testContext(t), holder.Client{Path: r.holderSocket()}, id))
	select {
	case err := <-read:
		wantErr(t, err, unix.EIO)
	case <-time.After(patience / 4):
		t.Error("its user waits")
	}
	resume()
	must(t, f.Close())
	r.eventually("it is detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
}

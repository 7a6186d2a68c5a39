package engine

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Nobody who uses a volume notices the death of what serves it, but for a pause.

var (
	workerKills   = flag.Int("worker-kills", 6, "kills in TestSurviveWorkers")
	engineChanges = flag.Int("engine-changes", 2, "changes of each kind in TestSurviveEngines")
)

// fioSize is how much of a volume fio uses, behind what else uses it.
const fioSize = 16 * mib

// ioctlRange is an ioctl whose argument is a range of bytes.
func ioctlRange(f *os.File, request uint, span *[2]uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(span)))
	if errno != 0 {
		return errno
	}
	return nil
}

// snapshots makes and deletes snapshots of a volume until stop is called. They may fail, for what serves them dies.
func (r *rig) snapshots(id string) (stop func()) {
	end := make(chan struct{})
	var running sync.WaitGroup
	made := 0
	var there []string // perhaps: who has failed does not know
	step := func(i int) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.t.Context()), patience)
		defer cancel()
		name := fmt.Sprint("s", i)
		if _, err := r.client.CreateSnapshot(ctx, id, name, nil); err == nil {
			made++
		}
		there = append(there, name)
		for len(there) > 2 {
			if err := r.client.DeleteSnapshot(ctx, id, there[0]); err != nil && !errors.Is(err, qcow2.ErrNotFound) {
				return
			}
			there = there[1:]
		}
	}
	running.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-end:
				return
			default:
				step(i)
			}
		}
	})
	return sync.OnceFunc(func() {
		close(end)
		running.Wait()
		r.t.Logf("%d snapshots of %s", made, id)
	})
}

// wantJournal checks which way the unanswered requests of a volume go.
func (r *rig) wantJournal(id string, want bool) {
	r.t.Helper()
	e, err := holder.Client{Path: r.holderSocket()}.Get(testContext(r.t), id)
	must(r.t, err)
	defer e.Close()
	device := len(e.FDs) - 1 // the first is the redo log's
	if got := device == 4; got != want {
		r.t.Fatalf("%d descriptors of the device are held", device)
	}
}

// killWorker kills the worker of a volume, if it has one.
func (r *rig) killWorker(id string) {
	r.t.Helper()
	if a := r.find(id); a != nil && a.WorkerPID != 0 {
		if err := unix.Kill(a.WorkerPID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			r.t.Fatal(err)
		}
	}
}

// Workers are killed at random moments, while guests write and snapshots come and go.
func TestSurviveWorkers(t *testing.T)        { surviveWorkers(t) }
func TestSurviveWorkersJournal(t *testing.T) { surviveWorkers(t, "--journal") }

func surviveWorkers(t *testing.T, args ...string) {
	t.Helper()
	r := newHeldRig(t, args...)
	const size = 64 * mib
	id := r.newVolume("a", size+fioSize)
	device := r.attach(id)
	r.wantJournal(id, slices.Contains(args, "--journal"))
	l := startLoad(t, device, size, 8)
	stopFio := startFio(t, device, size, fioSize)
	stop := r.snapshots(id)
	defer stop()
	rng := rand.New(rand.NewPCG(1, 2))
	for range *workerKills {
		l.awaitProgress(t)
		<-time.After(time.Duration(rng.IntN(300)) * time.Millisecond)
		r.killWorker(id)
		if t.Failed() {
			return
		}
	}
	l.awaitProgress(t)
	stop()
	stopFio()
	t.Logf("%d kills, %d requests, the longest %v", *workerKills, l.done.Load(), l.end(t))
	l.verify(t, device)
	r.eventually("detached", func() bool { return r.client.Detach(testContext(t), id) == nil })
	l.verify(t, r.attach(id))
}

// Engines and holders are killed, stopped and replaced while guests write.
func TestSurviveEngines(t *testing.T)        { surviveEngines(t) }
func TestSurviveEnginesJournal(t *testing.T) { surviveEngines(t, "--journal") }

func surviveEngines(t *testing.T, args ...string) {
	t.Helper()
	r := newHeldRig(t, args...)
	const size = 64 * mib
	var ids []string
	var loads []*load
	var fios []func()
	for i := range 2 {
		id := r.newVolume(fmt.Sprint(i), size+fioSize)
		device := r.attach(id)
		ids, loads = append(ids, id), append(loads, startLoad(t, device, size, 4))
		fios = append(fios, startFio(t, device, size, fioSize))
	}
	for _, change := range []struct {
		what string
		do   func()
	}{
		{"the engine is killed", func() { r.kill(); r.start(args...) }},
		{"the engine is killed with its workers", func() {
			pids := []int{r.find(ids[0]).WorkerPID, r.find(ids[1]).WorkerPID}
			must(t, r.engine.cmd.Process.Signal(unix.SIGSTOP))
			for _, pid := range pids {
				must(t, unix.Kill(pid, unix.SIGKILL))
			}
			r.kill()
			r.start(args...)
		}},
		{"the engine is stopped", func() { r.stop(); r.start(args...) }},
		{"the engine is upgraded", func() { r.upgrade(args...) }},
		{"the holder is upgraded", r.upgradeHolder},
	} {
		for range *engineChanges {
			for i, l := range loads {
				l.awaitProgress(t)
				if l.failed() {
					t.Fatalf("%s failed at: %s", ids[i], change.what)
				}
			}
			change.do()
		}
		for _, l := range loads {
			l.awaitProgress(t)
			t.Logf("%s: a request took up to %v", change.what, l.resetLongest())
		}
	}
	for i, l := range loads {
		l.end(t)
		fios[i]()
		device := r.attach(ids[i])
		if device != l.device {
			t.Errorf("%s is %s now", l.device, device)
		}
		l.verify(t, device)
	}
}

// upgrade starts another engine beside the one that runs, and ends that when the other stands by.
func (r *rig) upgrade(args ...string) {
	r.t.Helper()
	r.upgradeAfter(func(*testEngine) {}, args...)
}

// upgradeAfter is upgrade, with something to do while the other engine stands by.
func (r *rig) upgradeAfter(do func(next *testEngine), args ...string) {
	r.t.Helper()
	old, ready := r.engine, r.socket+".ready"
	_ = os.Remove(ready) // the old one's
	r.launch(append([]string{"--ready-file", ready}, args...)...)
	r.eventually("the next engine stands by", func() bool { return os.Remove(ready) == nil })
	do(r.engine)
	old.stop(r.t)
	r.awaitProbe(nil)
}

func (r *rig) upgradeHolder() {
	old := r.holder
	r.holder = r.process("holder", r.holderSocket())
	old.stop(r.t)
}

// A worker whose io_uring breaks does not know what became of its requests: it ends, and the next one carries them out.
func TestSurviveBrokenRing(t *testing.T) {
	r := newHeldRig(t)
	const size = 64 * mib
	id := r.newVolume("a", size)
	device := r.attach(id)
	l := startLoad(t, device, size, 8)
	for range 3 {
		l.awaitProgress(t)
		pid := r.find(id).WorkerPID
		must(t, unix.Kill(pid, unix.SIGUSR1))
		r.awaitReplaced(id, pid)
	}
	l.awaitProgress(t)
	l.end(t)
	l.verify(t, device)
}

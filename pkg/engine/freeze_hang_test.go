package engine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// helpers returns the helper processes that this test's engines have started, and in which state they are.
func helpers(t *testing.T) map[int]string {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	found := map[int]string{}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, file := range files {
		cmdline, _ := os.ReadFile(file)
		if !bytes.Equal(cmdline, []byte(self+"\x00helper\x00")) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		for _, task := range threads(pid) {
			if state := threadState(pid, task); found[pid] != "D" {
				found[pid] = state
			}
		}
	}
	return found
}

func threads(pid int) (tids []string) {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, e := range entries {
		tids = append(tids, e.Name())
	}
	return tids
}

func threadState(pid int, tid string) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", pid, tid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	state, _, _ := strings.Cut(rest, " ")
	return state
}

// awaitHelperWaiting waits until a helper waits for what no signal ends, and returns its process ID.
func awaitHelperWaiting(t *testing.T) (pid int) {
	t.Helper()
	eventually(t, "a helper waits", func() bool {
		pid = helperWaiting(t)
		return pid != 0
	})
	return pid
}

func helperWaiting(t *testing.T) (pid int) {
	t.Helper()
	for p, state := range helpers(t) {
		if state == "D" {
			pid = p
		}
	}
	return pid
}

// startSplice starts a process of a tenant that is in the middle of a write until it is ended.
func startSplice(t *testing.T, dir string) (end func()) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self, "writer", filepath.Join(dir, "held"))
	must(t, cmd.Start())
	end = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(end)
	eventually(t, "the tenant is in its write", func() bool {
		for _, tid := range threads(cmd.Process.Pid) {
			call, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/syscall", cmd.Process.Pid, tid))
			if number, _, _ := strings.Cut(string(call), " "); number == fmt.Sprint(unix.SYS_SPLICE) {
				return true
			}
		}
		return false
	})
	return end
}

// wantUsable fails unless a file system can be written, is not marked, and no helper is left.
func (r *rig) wantUsable(m *mountedFS) {
	t := r.t
	t.Helper()
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(filepath.Join(m.dir, "usable"), []byte("x"), 0o600) }()
	r.eventually("the file system is written", func() bool {
		select {
		case err := <-written:
			must(t, err)
			return true
		default:
			return false
		}
	})
	r.wantNoMarker(m.volume)
	r.eventually("no helper is left", func() bool { return len(helpers(t)) == 0 })
	if m.isFrozen(t) {
		t.Error("the file system is frozen")
	}
}

// A tenant that is in the middle of a write holds up the freeze of its own file system, and nothing else.
func TestFreezeHeldByWriter(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(*rig)
	}{
		{"engine goes on", func(*rig) {}},
		{"engine is stopped", func(r *rig) { r.stop(); r.start() }},
		{"engine is upgraded", func(r *rig) { r.upgrade() }},
		{"engine is killed", func(r *rig) { r.kill(); r.start() }},
		{"engine is killed with its helper", func(r *rig) {
			helper := awaitHelperWaiting(r.t)
			r.kill()
			must(r.t, unix.Kill(helper, unix.SIGKILL))
			r.start()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newHeldRig(t, "--max-freezing", "500ms")
			ctx := testContext(t)
			m, neighbour := r.mountedFS("ext4"), r.mountedFS("xfs")
			end := startSplice(t, m.dir)
			_, err := r.client.CreateSnapshot(ctx, m.volume, "s", m.handle)
			wantErr(t, err, ErrFreeze)
			_, err = r.client.CreateSnapshot(ctx, m.volume, "s", m.handle) // no second helper waits
			wantErr(t, err, ErrFreeze)
			t.Log(err)
			_, err = r.client.CreateSnapshot(ctx, neighbour.volume, "s", neighbour.handle)
			must(t, err)
			c.end(r)
			r.awaitReplaced(m.volume, 0)
			r.awaitReplaced(neighbour.volume, 0)
			r.eventually("the neighbour is frozen and thawed", func() bool {
				_, err = r.client.CreateSnapshot(ctx, neighbour.volume, "t", neighbour.handle)
				return err == nil
			})
			_, err = r.client.CreateSnapshot(ctx, m.volume, "unfrozen", nil)
			must(t, err)
			end()
			r.wantUsable(m)
			r.eventually("it is frozen and thawed", func() bool { // on a busy machine the time may not do
				_, err = r.client.CreateSnapshot(ctx, m.volume, "s", m.handle)
				return err == nil
			})
			m.unmount(t)
			neighbour.unmount(t)
		})
	}
}

// stopWorker stops a volume's worker until the test ends, or it is sent SIGCONT.
func (r *rig) stopWorker(volume string) (pid int) {
	r.t.Helper()
	pid = r.find(volume).WorkerPID
	must(r.t, unix.Kill(pid, unix.SIGSTOP))
	r.t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGCONT) })
	return pid
}

// stopWhileSyncing stops the worker of a volume whose file system is being synced for a snapshot.
func (r *rig) stopWhileSyncing(m *mountedFS, calls *sync.WaitGroup) (pid int) {
	r.t.Helper()
	dirty := bytes.Repeat([]byte("dirty"), 50*mib)
	for i := 0; pid == 0; i++ { // the kernel may have written most of it before
		must(r.t, os.WriteFile(filepath.Join(m.dir, "dirty"), dirty, 0o600))
		ended := make(chan struct{})
		calls.Go(func() {
			defer close(ended)
			_, err := r.client.CreateSnapshot(r.t.Context(), m.volume, fmt.Sprint("s", i), m.handle)
			if err != nil && !errors.Is(err, ErrUnavailable) {
				r.t.Errorf("the snapshot answered %v", err)
			}
		})
		r.eventually("a helper waits, or the snapshot is done", func() bool {
			select {
			case <-ended:
				return true
			default:
				if helperWaiting(r.t) != 0 {
					pid = r.stopWorker(m.volume)
				}
				return pid != 0
			}
		})
	}
	return pid
}

// An engine ends whatever a freeze is waiting for, the next one goes on at once, and nothing stays frozen.
func TestEndWhileFreezing(t *testing.T) {
	t.Parallel() // it waits, most of the time
	for _, step := range []string{"passed", "syncing", "frozen"} {
		for _, end := range []string{"stop", "kill"} {
			t.Run(step+"/"+end, func(t *testing.T) {
				r := newHeldRig(t)
				frozen := filepath.Join(t.TempDir(), "frozen")
				if step == "frozen" {
					r.stop()
					r.start("--hang-frozen", frozen)
				}
				m := r.mountedFS("ext4")
				neighbour := r.attach(r.newVolume("neighbour", mib))
				var calls sync.WaitGroup
				snapshot := func() {
					if _, err := r.client.CreateSnapshot(t.Context(), m.volume, "s", m.handle); !errors.Is(err, ErrUnavailable) {
						t.Errorf("the snapshot answered %v", err)
					}
				}
				worker := 0
				switch step {
				case "passed":
					must(t, r.client.PassFD(t.Context(), "token", m.handle))
				case "syncing":
					worker = r.stopWhileSyncing(m, &calls)
				case "frozen":
					calls.Go(snapshot)
					r.eventually("frozen", func() bool { _, err := os.Stat(frozen); return err == nil })
				}
				if end == "kill" {
					r.kill()
				} else {
					must(t, r.engine.cmd.Process.Signal(unix.SIGTERM))
				}
				if worker != 0 {
					must(t, unix.Kill(worker, unix.SIGCONT))
				}
				r.awaitEnd()
				calls.Wait()
				r.start()
				r.awaitReplaced(m.volume, 0)
				fillDevice(t, neighbour, 0, 4096, 1)
				r.wantUsable(m)
				m.unmount(t)
			})
		}
	}
}

// awaitEnd waits until the engine, which was told to end, has ended.
func (r *rig) awaitEnd() {
	r.t.Helper()
	r.eventually("the engine ends", func() bool {
		select {
		case <-r.engine.done:
			return true
		default:
			return false
		}
	})
}

// A worker that hangs keeps no engine from ending, nor the next one from serving the other volumes.
func TestStopWithHungWorker(t *testing.T) {
	t.Parallel() // it waits, most of the time
	r := newHeldRig(t)
	m, other := r.mountedFS("ext4"), r.newVolume("other", 64*mib)
	w := startWriter(t, r.attach(other), 64*mib)
	worker := r.stopWorker(m.volume)
	otherWorker := r.find(other).WorkerPID
	before := r.engine
	r.launch() // stands by
	must(t, before.cmd.Process.Signal(unix.SIGTERM))
	r.eventually("the next engine answers", func() bool {
		list, err := r.client.List(testContext(t))
		return err == nil && !slices.ContainsFunc(list, func(a Attachment) bool { return a.WorkerPID == otherWorker })
	})
	r.awaitReplaced(other, otherWorker)
	if threadState(worker, strconv.Itoa(worker)) != "T" {
		t.Error("the other volume waited for the worker that hangs")
	}
	w.awaitProgress(t)
	w.stop()
	w.done.Wait()
	must(t, w.err)
	r.eventually("the engine ends", func() bool {
		select {
		case <-before.done:
			return true
		default:
			return false
		}
	})
	r.awaitReplaced(m.volume, worker)
	r.wantUsable(m)
	m.unmount(t)
}

// A helper that is killed while it keeps a file system frozen is made up for.
func TestKillHelperWhileFrozen(t *testing.T) {
	r := newRig(t)
	r.inProcess(hooks{frozen: func() {
		for pid := range helpers(t) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		}
	}})
	m := r.mountedFS("xfs")
	_, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	wantErr(t, err, ErrFreeze)
	r.wantUsable(m)
	list, err := r.client.ListSnapshots(testContext(t), m.volume)
	must(t, err)
	if len(list) > 0 {
		t.Errorf("a snapshot is left: %+v", list)
	}
	m.unmount(t)
}

// A file system that somebody froze and that was unmounted since is thawed for the detach: nobody else could.
func TestDetachFrozen(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "ext3"} {
		t.Run(fsType, func(t *testing.T) {
			r := newRig(t)
			m := r.mountedFS(fsType)
			must(t, os.WriteFile(filepath.Join(m.dir, "file"), []byte("kept"), 0o600))
			run(t, "fsfreeze", "-f", m.dir)
			m.unmount(t)
			r.detach(m.volume)
			dir := mount(t, r.attach(m.volume), fsType)
			got, err := os.ReadFile(filepath.Join(dir, "file"))
			must(t, err)
			if string(got) != "kept" {
				t.Errorf("read %q", got)
			}
			must(t, unix.Unmount(dir, 0))
		})
	}
}

// A repeated CreateSnapshot leaves nothing that keeps the file system from being unmounted.
func TestPassedInVain(t *testing.T) {
	r := newRig(t)
	m := r.mountedFS("ext4")
	for range 2 {
		_, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
		must(t, err)
	}
	_, err := r.client.CreateSnapshot(testContext(t), r.pool.NewID("none"), "s", m.handle)
	wantErr(t, err, pool.ErrNotFound)
	r.eventually("no helper is left", func() bool { return len(helpers(t)) == 0 })
	m.unmount(t)
}

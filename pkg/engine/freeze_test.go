package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	fiFreeze = 0xC0045877 // FIFREEZE, _IOWR('X', 119, int)
	fiThaw   = 0xC0045878 // FITHAW, _IOWR('X', 120, int)
)

// mountedFS is an attached volume with a mounted file system.
type mountedFS struct {
	volume, device, dir string
	handle              *os.File // of dir
}

const fsSize = 512 * mib

func (r *rig) mountedFS(fsType string) *mountedFS {
	r.t.Helper()
	m := &mountedFS{volume: r.newVolume(fsType, fsSize)}
	m.device = r.attach(m.volume)
	run(r.t, "mkfs."+fsType, "-q", m.device)
	m.dir = mount(r.t, m.device, fsType)
	var err error
	m.handle, err = os.Open(m.dir)
	must(r.t, err)
	r.t.Cleanup(func() {
		_ = unix.IoctlSetInt(int(m.handle.Fd()), fiThaw, 0)
		m.handle.Close()
	})
	return m
}

// unmount ends what mountedFS began.
func (m *mountedFS) unmount(t *testing.T) {
	t.Helper()
	m.handle.Close()
	must(t, unix.Unmount(m.dir, 0))
}

// isFrozen tells whether the file system is frozen, by freezing it.
func (m *mountedFS) isFrozen(t *testing.T) bool {
	t.Helper()
	err := unix.IoctlSetInt(int(m.handle.Fd()), fiFreeze, 0)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	must(t, err)
	must(t, unix.IoctlSetInt(int(m.handle.Fd()), fiThaw, 0))
	return false
}

// wantNoMarker waits until nothing says that a volume's file system may be frozen.
func (r *rig) wantNoMarker(volume string) {
	r.t.Helper()
	r.eventually("the marker is gone", func() bool {
		_, set, err := r.pool.Marked(volume, pool.Frozen)
		must(r.t, err)
		return !set
	})
}

// fileWriter makes files, none of them synced, until it is stopped.
type fileWriter struct {
	closed atomic.Int64 // files from 0 on that are whole
	quit   atomic.Bool
	done   sync.WaitGroup
	err    error // read after done
}

func fileContent(n int64) string { return strings.Repeat(fmt.Sprintf("file %d\n", n), 1000) }

func writeFiles(dir string) *fileWriter {
	w := &fileWriter{}
	w.done.Go(func() {
		for n := int64(0); w.err == nil && !w.quit.Load(); n++ {
			w.err = os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), []byte(fileContent(n)), 0o600)
			w.closed.Store(n + 1)
		}
	})
	return w
}

func (w *fileWriter) stop(t *testing.T) {
	t.Helper()
	w.quit.Store(true)
	w.done.Wait()
	must(t, w.err)
}

// restore makes a volume of a snapshot of a detached one.
func (r *rig) restore(id, snapshot string) string {
	r.t.Helper()
	lease, err := r.pool.Lock(id)
	must(r.t, err)
	defer func() { must(r.t, lease.Unlock()) }()
	img, err := lease.Open(true)
	must(r.t, err)
	defer img.Close()
	view, err := img.OpenSnapshot(qcow2.ByName(snapshot))
	must(r.t, err)
	defer view.Close()
	name := fmt.Sprintf("%s%d-restored-%s", testVolumePrefix, os.Getpid(), snapshot)
	restored := r.pool.NewID(name)
	must(r.t, r.pool.Create(r.t.Context(), pool.Volume{ID: restored, Name: name, Size: view.Size()},
		func(ctx context.Context, path string) error {
			f, err := qcow2.CreateFile(path)
			if err != nil {
				return err
			}
			return errors.Join(qcow2.Clone(ctx, f, view, 0, nil), f.Close())
		}))
	return restored
}

// The snapshot of a frozen file system holds every file that was written before the call, synced or not,
// and needs no journal to be replayed.
func TestFreeze(t *testing.T) {
	for fsType, options := range map[string]string{"ext4": "noload", "xfs": "norecovery,nouuid"} {
		t.Run(fsType, func(t *testing.T) {
			r := newRig(t)
			m := r.mountedFS(fsType)
			w := writeFiles(m.dir)
			eventually(t, "the writer is at work", func() bool { return w.closed.Load() > 20 })
			_, err := r.client.CreateSnapshot(testContext(t), m.volume, "unfrozen", nil)
			must(t, err)
			before := w.closed.Load()
			_, err = r.client.CreateSnapshot(testContext(t), m.volume, "frozen", m.handle)
			must(t, err)
			after := w.closed.Load()
			eventually(t, "the writer goes on", func() bool { return w.closed.Load() > after+20 })
			w.stop(t)
			r.wantNoMarker(m.volume)
			m.unmount(t)
			r.detach(m.volume)

			device := r.attach(r.restore(m.volume, "frozen"))
			if fsType == "ext4" {
				if out := run(t, "dumpe2fs", "-h", device); strings.Contains(out, "needs_recovery") {
					t.Error("the journal needs to be replayed")
				}
				run(t, "e2fsck", "-fn", device)
				// The same question about a snapshot without a freeze, to see that it can be answered otherwise.
				other := r.attach(r.restore(m.volume, "unfrozen"))
				if out := run(t, "dumpe2fs", "-h", other); !strings.Contains(out, "needs_recovery") {
					t.Error("a snapshot without a freeze needs no replay: this test proves nothing")
				}
			}
			dir := t.TempDir()
			must(t, unix.Mount(device, dir, fsType, unix.MS_RDONLY, options))
			defer func() { must(t, unix.Unmount(dir, 0)) }()
			for n := range before {
				got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(n)))
				if err != nil || string(got) != fileContent(n) {
					t.Fatalf("file %d of %d: %v, %d bytes", n, before, err, len(got))
				}
			}
			t.Logf("%d files", before)
		})
	}
}

func TestFreezeForeign(t *testing.T) {
	r := newRig(t)
	m := r.mountedFS("ext4")
	run(t, "fsfreeze", "-f", m.dir)
	first, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	must(t, err)
	again, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	must(t, err)
	if first != again {
		t.Errorf("created again as %+v, first as %+v", again, first)
	}
	if !m.isFrozen(t) {
		t.Error("somebody else's freeze was ended")
	}
	run(t, "fsfreeze", "-u", m.dir)
	m.unmount(t)
}

func TestFreezeRefusals(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	m := r.mountedFS("ext4")
	elsewhere, err := os.Open(t.TempDir())
	must(t, err)
	defer elsewhere.Close()
	_, err = r.client.CreateSnapshot(ctx, m.volume, "s", elsewhere)
	wantErr(t, err, ErrFreeze)
	file, err := os.Create(filepath.Join(m.dir, "file"))
	must(t, err)
	_, err = r.client.CreateSnapshot(ctx, m.volume, "s", file)
	wantErr(t, err, ErrFreeze)
	file.Close()
	list, err := r.client.ListSnapshots(ctx, m.volume)
	must(t, err)
	if len(list) > 0 {
		t.Errorf("snapshots were made: %+v", list)
	}
	m.unmount(t)
}

// A supervisor that dies with its helper while a file system is frozen: the next one thaws it, also if it cannot see where
// it is mounted.
func TestKillSupervisorWhileFrozen(t *testing.T) {
	for _, c := range []struct {
		fsType string
		hidden bool
	}{{"ext4", false}, {"xfs", false}, {"ext4", true}, {"xfs", true}} {
		t.Run(fmt.Sprintf("%s,hidden=%v", c.fsType, c.hidden), func(t *testing.T) {
			r := newRig(t)
			r.stop()
			frozen := filepath.Join(t.TempDir(), "frozen")
			r.start("--hang-frozen", frozen)
			m := r.mountedFS(c.fsType)
			var calls sync.WaitGroup
			calls.Go(func() {
				if _, err := r.client.CreateSnapshot(t.Context(), m.volume, "s", m.handle); !errors.Is(err, ErrUnavailable) {
					t.Errorf("the snapshot answered %v", err)
				}
			})
			eventually(t, "frozen", func() bool { _, err := os.Stat(frozen); return err == nil })
			must(t, r.engine.cmd.Process.Signal(unix.SIGSTOP))
			for pid := range helpers(t) { // it would thaw
				must(t, unix.Kill(pid, unix.SIGKILL))
			}
			r.kill()
			calls.Wait()
			if !m.isFrozen(t) {
				t.Fatal("the file system is not frozen: this test proves nothing")
			}
			if c.hidden {
				must(t, unix.Unmount(m.dir, unix.MNT_DETACH))
			}
			written := make(chan error, 1)
			blocked := fmt.Sprintf("/proc/self/fd/%d/blocked", m.handle.Fd())
			go func() { written <- os.WriteFile(blocked, []byte("x"), 0o600) }()

			r.start()
			select {
			case err := <-written:
				t.Logf("the blocked writer got: %v", err)
			case <-time.After(patience):
				t.Fatal("the writer is blocked for ever")
			}
			if a := r.find(m.volume); a == nil || a.Failure == "" {
				t.Errorf("listed as %+v", a)
			}
			r.wantNoMarker(m.volume)
			m.handle.Close()
			if !c.hidden {
				must(t, unix.Unmount(m.dir, unix.MNT_DETACH))
			}
			eventually(t, "the dead device is gone", func() bool { return r.client.Detach(t.Context(), m.volume) == nil })
			dir := mount(t, r.attach(m.volume), c.fsType)
			must(t, unix.Unmount(dir, 0))
		})
	}
}

// inProcess replaces the rig's engine by one in this process, whose hook the test sets.
func (r *rig) inProcess(h hooks) {
	r.t.Helper()
	r.inProcessWith(Options{hooks: h})
}

func (r *rig) inProcessWith(o Options) {
	r.t.Helper()
	r.stop()
	self, err := os.Executable()
	must(r.t, err)
	o.Listen, o.PoolDir, o.WorkerCommand = "unix://"+r.socket, r.dir, []string{self, "worker"}
	ctx, cancel := context.WithCancel(r.t.Context())
	var engine sync.WaitGroup
	engine.Go(func() {
		if err := Run(ctx, o); err != nil {
			r.t.Errorf("engine: %v", err)
		}
	})
	r.t.Cleanup(func() {
		cancel()
		engine.Wait()
	})
	r.awaitProbe(nil)
}

// A worker that dies while its file system is frozen: the supervisor thaws it.
func TestKillWorkerWhileFrozen(t *testing.T) {
	r := newRig(t)
	var m *mountedFS
	r.inProcess(hooks{frozen: func() {
		if err := unix.Kill(r.find(m.volume).WorkerPID, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}})
	m = r.mountedFS("ext4")
	_, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	wantErr(t, err, ErrUnavailable)
	if err := unix.IoctlSetInt(int(m.handle.Fd()), fiThaw, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("the file system is still frozen: FITHAW answered %v", err)
	}
	m.handle.Close()
	must(t, unix.Unmount(m.dir, unix.MNT_DETACH))
}

// The file system is thawed before the snapshot, by somebody else or because it took too long: there is
// none then.
func TestFreezeLost(t *testing.T) {
	for name, thawed := range map[string]func(t *testing.T, m *mountedFS){
		"thawed by another": func(t *testing.T, m *mountedFS) {
			if err := unix.IoctlSetInt(int(m.handle.Fd()), fiThaw, 0); err != nil {
				t.Error(err)
			}
		},
		"too long": func(t *testing.T, m *mountedFS) {
			eventually(t, "thawed", func() bool { return !m.isFrozen(t) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			ctx := testContext(t)
			var m *mountedFS
			h := hooks{frozen: func() { thawed(t, m) }}
			if name == "too long" {
				h.maxFrozen = 100 * time.Millisecond
			}
			r.inProcess(h)
			m = r.mountedFS("ext4")
			_, err := r.client.CreateSnapshot(ctx, m.volume, "s", m.handle)
			wantErr(t, err, ErrFreeze)
			list, err := r.client.ListSnapshots(ctx, m.volume)
			must(t, err)
			if len(list) > 0 {
				t.Errorf("a snapshot is left: %+v", list)
			}
			m.unmount(t)
		})
	}
}

// A mistake of ours while a file system is frozen: it is thawed, and the engine goes on.
func TestPanicWhileFrozen(t *testing.T) {
	r := newRig(t)
	r.inProcess(hooks{frozen: func() { panic("in a test") }})
	m := r.mountedFS("ext4")
	_, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	if err == nil {
		t.Error("the snapshot was made")
	}
	if m.isFrozen(t) {
		t.Error("the file system is still frozen")
	}
	_, err = r.client.CreateSnapshot(testContext(t), m.volume, "s", nil)
	must(t, err)
	m.unmount(t)
}

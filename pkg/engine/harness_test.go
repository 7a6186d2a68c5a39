package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	mib = 1 << 20
	// patience bounds what a test waits for; it is never reached when all is well.
	patience = 2 * time.Minute
)

// rig is a pool, and the engines that a test starts on it.
type rig struct {
	t      *testing.T
	dir    string // of the pool
	disk   string // the file with the pool's file system, if it has its own
	socket string
	pool   *pool.Pool
	client *Client
	engine *testEngine
	holder *testEngine // nil: the engine is its own
}

// holderSocket is where the holder listens, if there is one.
func (r *rig) holderSocket() string { return r.socket + ".held" }

// newHeldRig is newRig with a holder, which keeps the volumes whatever happens to the engine.
func newHeldRig(t *testing.T, args ...string) *rig {
	t.Helper()
	r := newIdleRig(t)
	must(t, pool.Init(r.dir))
	p, err := pool.Open(r.dir)
	must(t, err)
	r.pool = p
	r.holder = r.process("holder", r.holderSocket())
	r.start(args...)
	return r
}

// testEngine is a supervisor process.
type testEngine struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // read after done
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newRig makes a pool and starts an engine on it.
func newRig(t *testing.T) *rig {
	t.Helper()
	r := newIdleRig(t)
	must(t, pool.Init(r.dir))
	p, err := pool.Open(r.dir)
	must(t, err)
	r.pool = p
	r.start()
	return r
}

// newIdleRig makes an empty directory and a client; the engine is not started.
func newIdleRig(t *testing.T) *rig {
	t.Helper()
	base := t.TempDir()
	r := &rig{t: t, dir: filepath.Join(base, "pool"), socket: filepath.Join(base, "engine.sock")}
	must(t, os.Mkdir(r.dir, 0o700))
	client, err := NewClient("unix://" + r.socket)
	must(t, err)
	r.client = client
	t.Cleanup(func() {
		r.cleanUp()
		client.Close()
	})
	return r
}

// start starts an engine and waits until it answers.
func (r *rig) start(args ...string) {
	r.t.Helper()
	r.launch(args...)
	r.awaitProbe(nil)
}

func (r *rig) launch(args ...string) {
	r.t.Helper()
	args = append([]string{"supervisor", "--listen", "unix://" + r.socket, "--pool", r.dir}, args...)
	if r.holder != nil {
		args = append(args, "--holder", r.holderSocket())
	}
	r.engine = r.process(args...)
}

// process starts this binary in another role.
func (r *rig) process(args ...string) *testEngine {
	r.t.Helper()
	self, err := os.Executable()
	must(r.t, err)
	e := &testEngine{cmd: exec.Command(self, args...), done: make(chan struct{})}
	e.cmd.Stderr = r.t.Output()
	e.cmd.WaitDelay = 10 * time.Second
	_, err = e.cmd.StdinPipe() // ends, and the engine with it, when this process does
	must(r.t, err)
	must(r.t, e.cmd.Start())
	go func() {
		defer close(e.done)
		e.err = e.cmd.Wait()
	}()
	return e
}

// awaitProbe waits until Probe answers as wanted, nil or an error.
func (r *rig) awaitProbe(want error) {
	r.t.Helper()
	r.eventually("engine answers", func() bool {
		ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
		defer cancel()
		_, err := r.client.Probe(ctx)
		return errors.Is(err, want)
	})
}

// eventually waits for a condition that no event announces.
func (r *rig) eventually(what string, done func() bool) {
	r.t.Helper()
	eventually(r.t, what, done)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

// kill ends the engine without warning.
func (r *rig) kill() {
	r.t.Helper()
	must(r.t, r.engine.cmd.Process.Kill())
	<-r.engine.done
}

// stop ends the engine in order.
func (r *rig) stop() {
	r.t.Helper()
	r.engine.stop(r.t)
}

func (e *testEngine) stop(t *testing.T) {
	t.Helper()
	must(t, e.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-e.done:
		if e.err != nil {
			t.Errorf("%s ended with %v", e.cmd.Args[1], e.err)
		}
	case <-time.After(patience):
		t.Errorf("%s does not end", e.cmd.Args[1])
		_ = e.cmd.Process.Kill()
		<-e.done
	}
}

// detachAll detaches what is attached: a holder would keep it for ever.
func (r *rig) detachAll() {
	t := r.t
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	list, err := r.client.List(ctx)
	if err != nil {
		t.Errorf("list what is attached: %v", err)
	}
	for _, a := range list {
		err := ErrUnavailable
		// While its worker is replaced, or another test's process has a copy of the mount.
		for ctx.Err() == nil && (errors.Is(err, ErrUnavailable) || errors.Is(err, ErrInUse)) {
			err = r.client.Detach(ctx, a.VolumeID)
		}
		if err != nil {
			t.Errorf("detach %s: %v", a.VolumeID, err)
		}
	}
}

// cleanUp stops the engine, makes sure that nothing is left, and has every image checked.
func (r *rig) cleanUp() {
	t := r.t
	if r.holder != nil {
		r.detachAll()
	}
	if e := r.engine; e != nil {
		select {
		case <-e.done:
		default:
			r.stop()
		}
	}
	if r.holder != nil {
		if t.Failed() { // it may hold something
			_ = r.holder.cmd.Process.Kill()
			<-r.holder.done
		} else {
			r.holder.stop(t)
		}
	}
	if r.pool == nil {
		return
	}
	devices, err := blockdev.Find(worker.DevicePrefix)
	if err != nil {
		t.Error(err)
	}
	for _, d := range devices {
		if id := strings.TrimPrefix(d.Name, worker.DevicePrefix); r.pool.Owns(id) {
			t.Errorf("%s of %s is left", d.Path, id)
			unmountAll(d.Path)
			_ = blockdev.Clear(d.Path, d.Name)
		}
	}
	r.checkVolumes()
}

// checkVolumes has the image of every volume checked.
func (r *rig) checkVolumes() {
	t := r.t
	volumes, err := r.pool.Volumes()
	if err != nil {
		t.Error(err)
	}
	for _, v := range volumes {
		checkImage(t, r.pool.ImagePath(v.ID))
	}
}

// newVolume makes a volume with an empty image.
func (r *rig) newVolume(name string, size int64) string {
	r.t.Helper()
	name = fmt.Sprintf("%s%d-%s", testVolumePrefix, os.Getpid(), name)
	id := r.pool.NewID(name)
	v := pool.Volume{ID: id, Name: name, Size: size, Created: time.Now()}
	err := r.pool.Create(r.t.Context(), v, func(_ context.Context, path string) error {
		f, err := qcow2.CreateFile(path)
		if err != nil {
			return err
		}
		return errors.Join(qcow2.Create(r.t.Context(), f, size, qcow2.CreateOptions{}), f.Close())
	})
	must(r.t, err)
	return id
}

// attach attaches a volume.
func (r *rig) attach(id string) (device string) {
	r.t.Helper()
	d, err := r.client.Attach(testContext(r.t), id)
	must(r.t, err)
	return d.Path
}

func (r *rig) detach(id string) {
	r.t.Helper()
	must(r.t, r.client.Detach(testContext(r.t), id))
}

// find returns the attachment of a volume, nil if there is none.
func (r *rig) find(id string) *Attachment {
	r.t.Helper()
	list, err := r.client.List(testContext(r.t))
	must(r.t, err)
	for _, a := range list {
		if a.VolumeID == id {
			return &a
		}
	}
	return nil
}

// checkImage has a detached image checked by us and by qemu-img. Leaks are all that a kill may leave.
func checkImage(t *testing.T, path string) {
	t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), "qemu-img", "check", path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
		t.Errorf("qemu-img check %s: %v\n%s", path, err, out)
	}
	f, err := qcow2.OpenFile(path, true)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	result, err := img.Check(context.WithoutCancel(t.Context()), nil)
	must(t, err)
	if s := result.ExitStatus(); s != 0 && s != 3 {
		t.Errorf("check %s: %d corruptions: %q", path, result.Corruptions, result.Problems)
	}
}

// run runs a command and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(testContext(t), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mount mounts a device until the test ends, and returns the directory.
func mount(t *testing.T, device, fsType string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	must(t, unix.Mount(device, dir, fsType, 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// openDirect opens a device past the page cache.
func openDirect(t *testing.T, device string) *os.File {
	t.Helper()
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	must(t, err)
	f := os.NewFile(uintptr(fd), device)
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned returns memory that direct I/O accepts. It lives as long as somebody uses it, which may be longer than a test that
// fails.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	return b[-int(uintptr(unsafe.Pointer(&b[0])))&4095:][:n]
}

// fillDevice writes n bytes of b at off, and flushes.
func fillDevice(t *testing.T, device string, off int64, n int, b byte) {
	t.Helper()
	f := openDirect(t, device)
	buf := aligned(n)
	copy(buf, bytes.Repeat([]byte{b}, n))
	_, err := f.WriteAt(buf, off)
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())
}

// wantDevice fails unless n bytes at off are all b.
func wantDevice(t *testing.T, device string, off int64, n int, b byte) {
	t.Helper()
	f := openDirect(t, device)
	buf := aligned(n)
	_, err := f.ReadAt(buf, off)
	must(t, err)
	must(t, f.Close())
	if want := bytes.Repeat([]byte{b}, n); !bytes.Equal(buf, want) {
		t.Fatalf("%s at %d: not all of %d bytes are %#x", device, off, n, b)
	}
}

// wantImage fails unless n bytes at off of an image that nobody has open are all b.
func wantImage(t *testing.T, path string, off int64, n int, b byte) {
	t.Helper()
	f, err := qcow2.OpenFile(path, true)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	buf := make([]byte, n)
	_, err = img.ReadAt(buf, off)
	must(t, err)
	if want := bytes.Repeat([]byte{b}, n); !bytes.Equal(buf, want) {
		t.Fatalf("%s at %d: not all of %d bytes are %#x", path, off, n, b)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantErr fails unless err matches the sentinel.
func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

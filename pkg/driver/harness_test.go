package driver

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

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	testNode = "node-a"
	mib      = 1 << 20
	gib      = 1 << 30
	// patience bounds what a test waits for; it is never reached when all is well.
	patience = 60 * time.Second
)

// rig is a node: a pool, an engine process, and a plugin in this process.
type rig struct {
	t         *testing.T
	base, dir string // dir is the pool
	engine    *process
	holder    string // the socket of a holder; empty: the engine is its own
	client    *engine.Client
	stop      func() // ends the plugin in this process
	atEnd     func() // when the images have been checked

	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
}

// newRig starts a node on a new pool.
func newRig(t *testing.T) *rig {
	t.Helper()
	r := newIdleRig(t)
	must(t, pool.Init(r.dir))
	r.startEngine()
	r.startPlugin(Options{})
	return r
}

// newIdleRig makes an empty directory where the pool is to be. The test then runs beside others: each waits for disks
// most of the time.
func newIdleRig(t *testing.T) *rig {
	t.Helper()
	t.Parallel()
	// A short path, for sockets, which says whose it is, for removeLeftovers.
	base, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", basePrefix, os.Getpid()))
	must(t, err)
	r := &rig{t: t, base: base, dir: filepath.Join(base, "pool")}
	must(t, os.Mkdir(r.dir, 0o700))
	t.Cleanup(r.cleanUp)
	return r
}

func (r *rig) endpoint(name string) string { return "unix://" + filepath.Join(r.base, name) }

// startEngine starts an engine and waits until it answers, whatever it answers.
func (r *rig) startEngine() {
	r.t.Helper()
	r.engine = startProcess(r.t, "engine", "--listen", r.endpoint("engine.sock"), "--pool", r.dir, "--node-id", testNode,
		"--holder", r.holder)
	client, err := engine.NewClient(r.endpoint("engine.sock"))
	must(r.t, err)
	r.client = client
	r.t.Cleanup(func() { client.Close() })
	eventually(r.t, "the engine answers", func() bool {
		_, err := client.Probe(r.t.Context())
		return err == nil || errors.Is(err, pool.ErrNotReady)
	})
}

// startPlugin runs a plugin in this process.
func (r *rig) startPlugin(o Options) {
	r.t.Helper()
	o.Endpoint, o.NodeID, o.PoolDir, o.Version = r.endpoint("csi.sock"), testNode, r.dir, "test"
	if o.Engine == nil {
		o.Engine = r.client
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, o) }()
	r.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Errorf("plugin: %v", err)
		}
		r.stop = nil
	}
	r.dial("csi.sock")
}

// dial connects the rig's clients to a plugin, and waits until it answers.
func (r *rig) dial(socket string) {
	r.t.Helper()
	conn, err := grpc.NewClient(r.endpoint(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(r.t, err)
	r.t.Cleanup(func() { conn.Close() })
	r.IdentityClient, r.ControllerClient, r.NodeClient =
		csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	eventually(r.t, "the plugin answers", func() bool {
		_, err := r.GetPluginInfo(r.t.Context(), &csi.GetPluginInfoRequest{})
		return err == nil
	})
}

// cleanUp ends everything, checks every image that is left, and that nothing else is.
func (r *rig) cleanUp() {
	if r.stop != nil {
		r.stop()
	}
	if r.t.Failed() {
		cleanUnder(r.base) // before the engine, which would wait for what is mounted
	}
	if r.engine != nil {
		r.engine.terminate()
	}
	if p, err := pool.Open(r.dir); err == nil {
		r.checkImages(p)
	}
	if r.atEnd != nil {
		r.atEnd()
	}
	if left := r.leftovers(); len(left) > 0 {
		r.t.Errorf("left behind: %q", left)
		cleanUnder(r.base)
	}
	if err := os.RemoveAll(r.base); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) leftovers() []string {
	var left []string
	infos, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(r.base))
	for _, m := range infos {
		left = append(left, m.Mountpoint)
	}
	p, err := pool.Open(r.dir)
	if err != nil {
		return left
	}
	devices, _ := blockdev.Find("csiq:")
	for _, d := range devices {
		if p.Owns(strings.TrimPrefix(d.Name, "csiq:")) {
			left = append(left, d.Path)
		}
	}
	return left
}

// checkImages has QEMU and our own checker look at each image.
func (r *rig) checkImages(p *pool.Pool) {
	volumes, err := p.Volumes()
	if err != nil {
		r.t.Error(err)
	}
	for _, v := range volumes {
		if out, err := exec.Command("qemu-img", "check", p.ImagePath(v.ID)).CombinedOutput(); err != nil {
			r.t.Errorf("qemu-img check %s: %v\n%s", v.ID, err, out)
		}
		lease, err := p.Lock(v.ID)
		if err != nil {
			r.t.Error(err)
			continue
		}
		if img, err := lease.Open(true); err != nil {
			r.t.Error(err)
		} else {
			res, err := img.Check(context.WithoutCancel(r.t.Context()), nil)
			if err != nil || res.ExitStatus() != 0 {
				r.t.Errorf("check %s: %v, %+v", v.ID, err, res)
			}
			img.Close()
		}
		if err := lease.Unlock(); err != nil {
			r.t.Error(err)
		}
	}
}

// process is this test binary in another role.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(t *testing.T, args ...string) *process {
	t.Helper()
	p := newProcess(t, args...)
	p.start(p.cmd.Start)
	return p
}

func newProcess(t *testing.T, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	p := &process{t: t, cmd: exec.Command(self, args...), done: make(chan struct{})}
	p.cmd.Stderr = t.Output()
	p.cmd.WaitDelay = 10 * time.Second
	return p
}

// start begins the process the way that it is told.
func (p *process) start(begin func() error) {
	p.t.Helper()
	must(p.t, begin())
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) terminate() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Errorf("%s does not end", p.cmd.Args[1])
		p.kill()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ok returns the answer of a call that must succeed: ok(t)(r.CreateVolume(…)).
func ok[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// wantCode checks how a call failed: wantCode(t, codes.NotFound)(r.GetSnapshot(…)).
func wantCode(t *testing.T, code codes.Code) func(any, error) {
	t.Helper()
	return func(_ any, err error) {
		t.Helper()
		if status.Code(err) != code {
			t.Errorf("got %v, want %v", err, code)
		}
	}
}

// eventually waits for a condition that no event announces.
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

// run runs a tool and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func codeOfCall(err error) string { return status.Code(err).String() }

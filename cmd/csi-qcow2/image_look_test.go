package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// node is a pool with a running engine.
type node struct {
	t        *testing.T
	pool     *pool.Pool
	endpoint string
	client   *engine.Client
}

// newNode starts an engine on a new pool, which ends with the test.
func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "csiq-") // whose path leaves room for a socket's name
	must(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	n := &node{t: t, endpoint: "unix://" + dir + "/engine.sock"}
	must(t, pool.Init(dir+"/pool"))
	n.pool, err = pool.Open(dir + "/pool")
	must(t, err)
	ready := dir + "/ready"
	cmd := exec.Command("/proc/self/exe", "engine", "--listen", n.endpoint, "--pool", n.pool.Dir(), "--ready-file", ready)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stderr = t.Output()
	must(t, cmd.Start())
	t.Cleanup(func() { // which also detaches what is attached
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	n.client, err = engine.NewClient(n.endpoint)
	must(t, err)
	t.Cleanup(func() { n.client.Close() })
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		if _, err := os.Stat(ready); err == nil {
			tick.Stop()
			return n
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the engine is not ready")
		}
	}
}

// volume makes a volume and returns its ID.
func (n *node) volume(name string, size int64) string {
	n.t.Helper()
	v := pool.Volume{ID: n.pool.NewID(name), Name: name, Size: size, Claim: pool.Claim{Namespace: "default", Name: "claim-" + name}}
	must(n.t, n.pool.Create(n.t.Context(), v, func(_ context.Context, path string) error {
		f, err := qcow2.CreateFile(path)
		if err != nil {
			return err
		}
		if err := qcow2.Create(n.t.Context(), f, size, qcow2.CreateOptions{}); err != nil {
			return err
		}
		return f.Close()
	}))
	return v.ID
}

// attach attaches a volume and returns its device.
func (n *node) attach(id string) string {
	n.t.Helper()
	d, err := n.client.Attach(n.t.Context(), id)
	must(n.t, err)
	return d.Path
}

// write writes bytes to a device, durably.
func write(t *testing.T, device string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(data, off)
	must(t, err)
	must(t, f.Sync())
}

// TestAttachedVolume: a volume can be looked at, and its snapshots exported, while the engine serves it.
func TestAttachedVolume(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.volume("v", 64<<20)
	image, device := n.pool.ImagePath(id), n.attach(id)
	content := make([]byte, 1<<20)
	for i := range content {
		content[i] = byte(i>>12) + 1
	}
	write(t, device, 3<<20, content)
	_, err := n.client.CreateSnapshot(t.Context(), id, "first", nil)
	must(t, err)
	write(t, device, 3<<20, make([]byte, 1<<20))
	ask := []string{"--engine", n.endpoint}
	image1 := func(args ...string) string {
		t.Helper()
		return mustRun(t, append(append([]string{"image"}, args...), ask...)...)
	}

	var info imageInfo
	decode(t, image1("info", "-o", "json", image), &info)
	if info.VirtualSize != 64<<20 || len(info.Snapshots) != 1 || info.Attached == nil || info.Attached.Device != device {
		t.Errorf("info: %+v", info)
	}
	if got := image1("info", image); !strings.Contains(got, "attached as:") || !strings.Contains(got, "first") {
		t.Errorf("info:\n%s", got)
	}
	var list []snapshotInfo
	decode(t, image1("snapshot", "list", "-o", "json", image), &list)
	if len(list) != 1 || list[0].Name != "first" {
		t.Errorf("snapshot list: %+v", list)
	}
	var extents []mapEntry
	decode(t, image1("map", "--snapshot", "first", "-o", "json", image), &extents)
	for i := range extents {
		extents[i].Offset = nil // to be merged with the next
	}
	extents = merge(extents)
	if len(extents) != 3 || extents[1].Start != 3<<20 || extents[1].Length != 1<<20 || !extents[1].Data {
		t.Errorf("map: %+v", extents)
	}

	// What was written, and never flushed, is on the map.
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(content, 40<<20)
	must(t, err)
	decode(t, image1("map", "-o", "json", image), &extents)
	if !slices.ContainsFunc(extents, func(e mapEntry) bool { return e.Data && e.Start <= 40<<20 && e.Start+e.Length > 40<<20 }) {
		t.Errorf("map of what was not flushed: %+v", extents)
	}
	must(t, f.Close())

	want := make([]byte, 64<<20)
	copy(want[3<<20:], content)
	out := filepath.Join(t.TempDir(), "out.raw")
	image1("export", image, out, "--snapshot", "first")
	got, err := os.ReadFile(out)
	must(t, err)
	if sha256.Sum256(got) != sha256.Sum256(want) {
		t.Error("the exported snapshot is something else")
	}

	// What would not be consistent is refused, and says by whom the image is used.
	worker := fmt.Sprintf("worker (PID %d)", info.Attached.WorkerPID)
	for _, args := range [][]string{{"export", image, out + "2"}, {"check", image}, {"info", image, "--engine", "unix:///nowhere.sock"}} {
		r := run(t, append([]string{"image"}, args...)...)
		if r.status != 1 || !strings.Contains(r.stderr, "is in use by") || !strings.Contains(r.stderr, worker) {
			t.Errorf("image %v: %+v", args, r)
		}
	}
	n.looksAtVolumes(id, device)
}

// looksAtVolumes checks what is said of an attached volume of 64 MiB, and of the pool that holds it.
func (n *node) looksAtVolumes(id, device string) {
	t := n.t
	t.Helper()
	other := n.volume("other", 32<<20)
	where := []string{"--pool", n.pool.Dir(), "--engine", n.endpoint}
	var volumes []volumeInfo
	decode(t, mustRun(t, append([]string{"volume", "list", "-o", "json"}, where...)...), &volumes)
	states := map[string]string{}
	for _, v := range volumes {
		states[v.ID] = v.State
	}
	if len(states) != 2 || states[id] != stateAttached || states[other] != stateDetached {
		t.Errorf("volume list: %v", states)
	}
	if got := mustRun(t, append([]string{"volume", "list"}, where...)...); !strings.Contains(got, " default/claim-other\n") {
		t.Errorf("volume list:\n%s", got)
	}
	for _, name := range []string{id, "v", "default/claim-v"} {
		var v volumeInfo
		decode(t, mustRun(t, append([]string{"volume", "show", name, "-o", "json"}, where...)...), &v)
		if v.ID != id || v.Device != device || v.Size != 64<<20 || len(v.Snapshots) != 1 || v.Promised != 64<<20 || v.Claim.Name != "claim-v" {
			t.Errorf("volume show %s: %+v", name, v)
		}
	}
	if r := run(t, append([]string{"volume", "show", "none"}, where...)...); r.status != 1 || !strings.Contains(r.stderr, "no volume none") {
		t.Errorf("volume show none: %+v", r)
	}
	if got := mustRun(t, "volume", "list", "--pool", n.pool.Dir(), "--engine", "unix:///nowhere.sock"); !strings.Contains(got, stateInUse) {
		t.Errorf("without an engine:\n%s", got)
	}
	n.looksAtPool()
}

// looksAtPool checks what is said of a pool with two volumes, of which one has a snapshot.
func (n *node) looksAtPool() {
	t := n.t
	t.Helper()
	var status poolStatus
	decode(t, mustRun(t, "pool", "status", n.pool.Dir(), "--reserve", "0", "-o", "json"), &status)
	if len(status.Volumes) != 2 || status.Promised <= 64<<20 || status.Left > status.Free-status.Promised {
		t.Errorf("pool status: %+v", status)
	}
	if got := mustRun(t, "pool", "status", n.pool.Dir()); !strings.Contains(got, "reserved:     1 GiB") || !strings.Contains(got, "no plugin answers") {
		t.Errorf("pool status:\n%s", got)
	}
	// The plugin's own settings, if it can be asked.
	plugin := strings.Replace(n.endpoint, "engine.sock", "csi.sock", 1)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- driver.Run(ctx, driver.Options{
			Endpoint: plugin, NodeID: "node", PoolDir: n.pool.Dir(), Engine: n.client, Reserve: 3 << 20, Overcommit: 2.5, Version: "test",
		})
	}()
	for {
		decode(t, mustRun(t, "pool", "status", n.pool.Dir(), "--plugin", plugin, "-o", "json"), &status)
		if !status.Assumed || t.Context().Err() != nil {
			break
		}
	}
	if status.Reserved != 3<<20 || status.Overcommit != 2.5 {
		t.Errorf("pool status as its plugin counts: %+v", status)
	}
	decode(t, mustRun(t, "pool", "status", n.pool.Dir(), "--plugin", plugin, "--overcommit", "4", "-o", "json"), &status)
	if status.Reserved != 3<<20 || status.Overcommit != 4 {
		t.Errorf("pool status with another ratio: %+v", status)
	}
	stop()
	must(t, <-ended)
}

// TestForceShare: with -U an image is looked at whoever has it, and a snapshot that is deleted meanwhile is no good.
func TestForceShare(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	qemuIO(t, image, "write -P 5 0 64K")
	mustRun(t, "image", "snapshot", "create", image, "s")
	holdWithQEMU(t, image)
	for _, args := range [][]string{{"info", image}, {"snapshot", "list", image}, {"map", image}} {
		args = append([]string{"image"}, args...)
		if r := run(t, args...); r.status != 1 || !strings.Contains(r.stderr, "with -U") {
			t.Errorf("%v: %+v", args, r)
		}
		mustRun(t, append(args, "-U")...)
	}
	if got := mustRun(t, "image", "export", image, "-", "-U", "--snapshot", "s"); got != strings.Repeat("\x05", 64<<10)+strings.Repeat("\x00", 960<<10) {
		t.Error("the exported snapshot is something else")
	}
	if r := run(t, "image", "export", image, "-", "-U"); r.status != 2 || !strings.Contains(r.stderr, "needs --snapshot") {
		t.Errorf("the active disk: %+v", r)
	}
}

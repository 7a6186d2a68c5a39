package driver

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// startPluginProcess runs a plugin that can be killed.
func (r *rig) startPluginProcess() *process {
	r.t.Helper()
	p := startProcess(r.t, "plugin",
		"--endpoint", r.endpoint("csi.sock"), "--pool", r.dir, "--engine", r.endpoint("engine.sock"))
	r.t.Cleanup(p.kill)
	r.dial("csi.sock")
	return p
}

// TestKilledPlugin: a pod that writes does not notice that the plugin is killed, and the next plugin knows
// everything.
func TestKilledPlugin(t *testing.T) {
	r := newIdleRig(t)
	initPool(t, r.dir)
	r.startEngine()
	plugin := r.startPluginProcess()
	req := r.createRequest("disk", 64*mib, blockCapability(writer))
	req.Parameters = map[string]string{"snapshotLimit": "1000%"} // all is overwritten between the snapshots
	v := r.createFrom(req)
	path := v.publish("vm")
	fio := exec.Command("fio", "--name=verify", "--verify_state_save=0", "--filename="+path, "--rw=randwrite", "--bs=4k", "--size=64m", "--io_size=256m",
		"--direct=1", "--ioengine=libaio", "--iodepth=8", "--fsync=64", "--verify=crc32c", "--time_based", "--runtime=4")
	out := make(chan error, 1)
	var text []byte
	go func() {
		var err error
		text, err = fio.CombinedOutput()
		out <- err
	}()
	var want []string
	for i := range 4 {
		plugin.kill()
		plugin = r.startPluginProcess()
		want = append(want, v.snapshot("snap-"+string(rune('a'+i))))
		if ids := r.volumeIDs(); !slices.Equal(ids, []string{v.id}) {
			t.Errorf("volumes: %v", ids)
		}
		ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), v.publishRequest("vm"))) // kubelet repeats it
	}
	if err := <-out; err != nil {
		t.Errorf("fio: %v\n%s", err, text)
	}
	if ids := r.snapshotIDs(); !slices.Equal(ids, want) {
		t.Errorf("snapshots: %v, want %v", ids, want)
	}
	r.deleteSnapshots(want[1:]...)
	v.unstage("vm")
	v.delete()
	r.deleteSnapshots(want[0])
	r.wantEmpty()
	plugin.terminate()
	if _, err := os.Lstat(filepath.Join(r.base, "csi.sock")); err == nil {
		t.Error("the socket is left")
	}
}

// TestKilledEngine: the volume is staged and published again over what a dead engine or worker left, and holds what
// was flushed.
func TestKilledEngine(t *testing.T) {
	for _, c := range []struct {
		name, fsType string
		kill         func(*testing.T, *rig)
	}{
		{"engine/ext4", fsExt4, killEngine},
		{"engine/xfs", fsXFS, killEngine},
		{"worker/ext4", fsExt4, killWorker},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, fsType := newRig(t), c.fsType
			v := r.create("data", 512*mib, mountCapability(fsType))
			path := v.publish("pod")
			writeTree(t, filepath.Join(path, "tree"), "flushed", 20)
			want := digest(t, filepath.Join(path, "tree"))

			c.kill(t, r)
			wantCode(t, codes.FailedPrecondition)(r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id}))
			eventually(t, "the volume is staged again", func() bool {
				_, err := r.NodeStageVolume(t.Context(), v.stageRequest())
				return err == nil
			})
			ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), v.publishRequest("pod")))
			if got := digest(t, filepath.Join(path, "tree")); got != want {
				t.Error("flushed files are lost")
			}
			writeTree(t, filepath.Join(path, "more"), "more", 5)
			v.unstage("pod")
			v.delete()
			r.wantEmpty()
		})
	}
}

// killEngine kills the engine and starts another.
func killEngine(t *testing.T, r *rig) {
	t.Helper()
	r.engine.kill()
	wantCode(t, codes.Unavailable)(r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{}))
	wantCode(t, codes.Unavailable)(r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: r.volumeIDs()[0]}))
	r.wantUnready("EngineUnavailable")
	r.startEngine()
	r.awaitReady()
}

// killWorker kills the worker of the only volume.
func killWorker(t *testing.T, r *rig) {
	t.Helper()
	list, err := r.client.List(t.Context())
	must(t, err)
	pid := list[0].WorkerPID
	must(t, unix.Kill(pid, unix.SIGKILL))
	eventually(t, "another worker serves", func() bool {
		list, err := r.client.List(t.Context())
		must(t, err)
		return list[0].WorkerPID != 0 && list[0].WorkerPID != pid
	})
}

// TestShutdownEndsCopies: a copy ends with the plugin, leaves nothing, and the next plugin makes it anew.
func TestShutdownEndsCopies(t *testing.T) {
	r := newRig(t)
	source := r.create("source", 512*mib, blockCapability(writer))
	run(t, "fio", "--name=fill", "--filename="+source.publish("vm"), "--rw=write", "--bs=1m", "--direct=1", "--size=256m")
	source.unstage("vm")
	snap := source.snapshot("snap")
	req := r.createRequest("copy", 512*mib, blockCapability(writer))
	req.VolumeContentSource = contentSourceMessage("snapshot:" + snap)
	called := make(chan error, 1)
	go func() {
		_, err := r.CreateVolume(t.Context(), req)
		called <- err
	}()
	copying := filepath.Join(r.dir, "creating")
	eventually(t, "a copy is made, or done", func() bool {
		entries, err := os.ReadDir(copying)
		must(t, err)
		return len(entries) > 0 || len(called) > 0
	})
	stop := time.Now()
	r.stop()
	t.Logf("stopped in %v, the call ended with %v", time.Since(stop), <-called)
	if entries, err := os.ReadDir(copying); err != nil || len(entries) > 0 {
		t.Errorf("left of the copy: %v, %v", entries, err)
	}
	r.startPlugin(Options{})
	copied := r.createFrom(req)
	source.delete()
	copied.delete()
	r.deleteSnapshots(snap)
	r.wantEmpty()
}

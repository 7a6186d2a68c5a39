package driver

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
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
	v := r.create("disk", 64*mib, blockCapability(writer))
	path := v.publish("vm")
	fio := exec.Command("fio", "--name=verify", "--filename="+path, "--rw=randwrite", "--bs=4k", "--size=64m", "--io_size=256m",
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

// TestKilledEngine: the volume is staged and published again over what the dead engine left, and holds what
// was flushed.
func TestKilledEngine(t *testing.T) {
	for _, fsType := range []string{fsExt4, fsXFS} {
		t.Run(fsType, func(t *testing.T) {
			r := newRig(t)
			v := r.create("data", 512*mib, mountCapability(fsType))
			path := v.publish("pod")
			writeTree(t, filepath.Join(path, "tree"), "flushed", 20)
			want := digest(t, filepath.Join(path, "tree"))

			r.engine.kill()
			wantCode(t, codes.Unavailable)(r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.id}))
			wantCode(t, codes.Unavailable)(r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id}))
			r.startEngine()
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

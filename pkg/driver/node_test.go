package driver

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc/codes"
)

// TestFreeze: the snapshot of a mounted ext4 is as clean as an unmounted one, unless the class says no.
func TestFreeze(t *testing.T) {
	r := newRig(t)
	source := r.create("source", 64*mib, mountCapability(fsExt4))
	stopWriting := writeForever(t, filepath.Join(source.publish("pod"), "file"))
	frozen := source.snapshot("frozen")
	wild := ok[*csi.CreateSnapshotResponse](t)(r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{
		Name: "wild", SourceVolumeId: source.id, Parameters: map[string]string{paramFSFreeze: "false"},
	})).GetSnapshot().GetSnapshotId()
	stopWriting()
	for snap, clean := range map[string]bool{frozen: true, wild: false} {
		v := r.restore("restored", snap, 0, blockCapability(writer))
		features := run(t, "dumpe2fs", "-h", v.publish("pod"))
		if got := !strings.Contains(features, "needs_recovery"); got != clean {
			t.Errorf("%s: clean %v, want %v", snap, got, clean)
		}
		v.unstage("pod")
		v.delete()
	}
	source.unstage("pod")
	source.delete()
	r.deleteSnapshots(frozen, wild)
	r.wantEmpty()
}

// TestStageRefuses: a file system of another kind is never formatted, and a volume that could not be staged is
// not left attached.
func TestStageRefuses(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("data", 512*mib, mountCapability(fsXFS))
	must(t, os.WriteFile(filepath.Join(v.publish("pod"), "file"), []byte("precious"), 0o644))
	v.unstage("pod")
	v.capability = mountCapability(fsExt4)
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(ctx, v.stageRequest()))
	if list, err := r.client.List(ctx); err != nil || len(list) > 0 {
		t.Errorf("attached: %v, %v", list, err)
	}
	v.capability = mountCapability(fsXFS)
	path := v.publish("pod")
	if got, err := os.ReadFile(filepath.Join(path, "file")); err != nil || string(got) != "precious" {
		t.Errorf("%q, %v", got, err)
	}
	v.stage() // idempotent
	v.capability = mountCapability(fsExt4)
	wantCode(t, codes.AlreadyExists)(r.NodeStageVolume(ctx, v.stageRequest()))
	if got, err := os.ReadFile(filepath.Join(path, "file")); err != nil || string(got) != "precious" {
		t.Errorf("a pod lost its volume: %q, %v", got, err)
	}
	wantCode(t, codes.FailedPrecondition)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}))
	v.unstage("pod")
	v.delete()
	r.wantEmpty()
}

// TestForeignMounts: what is mounted at our paths and is not ours is left alone.
func TestForeignMounts(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	one, two := r.create("one", 16*mib, mountCapability(fsExt4)), r.create("two", 16*mib, mountCapability(fsExt4))
	path := one.publish("pod")
	must(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
	stage := two.stageRequest()
	stage.StagingTargetPath = one.stagingPath()
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(ctx, stage))
	two.stage()
	publish := two.publishRequest("pod")
	publish.TargetPath = path
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(ctx, publish))
	if _, err := os.Stat(filepath.Join(path, "file")); err != nil {
		t.Errorf("a pod lost its volume: %v", err)
	}
	must(t, os.MkdirAll(two.target("pod"), 0o700))
	run(t, "mount", "-t", "tmpfs", "tmpfs", two.target("pod"))
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(ctx, two.publishRequest("pod")))
	run(t, "umount", two.target("pod"))
	one.unstage("pod")
	two.unstage("pod")

	two.capability = blockCapability(writer)
	two.publish("vm")
	two.capability = mountCapability(fsExt4)
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(ctx, two.stageRequest()))
	if list, err := r.client.List(ctx); err != nil || len(list) != 1 {
		t.Errorf("a pod lost its device: %v, %v", list, err)
	}
	two.unstage("vm")
	one.delete()
	two.delete()
	r.wantEmpty()
}

// TestSymlinkedPaths: kubelet's directory may be a symbolic link; mountinfo shows where it leads.
func TestSymlinkedPaths(t *testing.T) {
	r := newRig(t)
	must(t, os.Mkdir(filepath.Join(r.base, "real"), 0o700))
	for _, link := range []string{"staging", "pods"} {
		must(t, os.Symlink("real", filepath.Join(r.base, link)))
	}
	v := r.create("data", 16*mib, mountCapability(fsExt4))
	path := v.publish("pod")
	must(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
	v.publish("pod") // again
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(r.base, "real")))
	must(t, err)
	if len(infos) != 2 {
		t.Errorf("%d mounts, want the staged and the published one", len(infos))
	}
	v.unstage("pod")
	v.delete()
	r.wantEmpty()
}

// TestPublishRefuses: what is not staged is not published, a single writer gets one target, and unpublishing never
// removes what a pod's directory holds.
func TestPublishRefuses(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("disk", 16*mib, blockCapability(csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER))
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(ctx, v.publishRequest("vm")))
	v.publish("vm")
	ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(ctx, v.publishRequest("vm")))
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(ctx, v.publishRequest("other")))
	v.unpublish("vm", "vm")
	v.publish("other")
	v.unstage("other")

	dir := v.target("busy")
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "not-ours"), nil, 0o600))
	if _, err := r.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: dir}); err == nil {
		t.Error("a directory with files was removed")
	}
	if _, err := os.Stat(filepath.Join(dir, "not-ours")); err != nil {
		t.Error(err)
	}
	v.delete()
}

// TestBrokenVolume: a volume whose image is broken fails alone.
func TestBrokenVolume(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	good, bad := r.create("good", 16*mib, blockCapability(writer)), r.create("bad", 16*mib, blockCapability(writer))
	snap := good.snapshot("snap")
	image := filepath.Join(r.dir, "volumes", bad.id, "image.qcow2")
	whole, err := os.ReadFile(image)
	must(t, err)
	must(t, os.WriteFile(image, make([]byte, len(whole)), 0o600))

	if ids := r.volumeIDs(); len(ids) != 2 {
		t.Errorf("volumes: %v", ids)
	}
	if ids := r.snapshotIDs(); len(ids) != 1 || ids[0] != snap {
		t.Errorf("snapshots: %v", ids)
	}
	other := good.snapshot("other")
	if _, err := r.NodeStageVolume(ctx, bad.stageRequest()); err == nil {
		t.Error("a broken volume was staged")
	}
	if _, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: bad.id}); err == nil {
		t.Error("a volume whose snapshots are unknown was deleted")
	}
	must(t, os.WriteFile(image, whole, 0o600))
	bad.delete()
	good.delete()
	r.deleteSnapshots(snap, other)
	r.wantEmpty()
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "csi.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: file, Net: "unix"})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	must(t, stale.Close())

	l, err := listen(t.Context(), "unix://"+file)
	must(t, err)
	info, err := os.Stat(file)
	must(t, err)
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if _, err := listen(t.Context(), "unix://"+file); err == nil {
		t.Error("a second plugin took the socket")
	}
	must(t, l.Close())
	if _, err := os.Lstat(file); err == nil {
		t.Error("the socket is left")
	}
	must(t, os.WriteFile(file, []byte("data"), 0o600))
	if _, err := listen(t.Context(), "unix://"+file); err == nil {
		t.Error("a file was replaced by the socket")
	}
	for _, endpoint := range []string{"", file, "unix://csi.sock", "tcp://127.0.0.1:1"} {
		if _, err := listen(t.Context(), endpoint); codeOrOK(err) != codes.InvalidArgument {
			t.Errorf("endpoint %q: %v", endpoint, err)
		}
	}
}

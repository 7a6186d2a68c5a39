package driver

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// either makes a volume that may be mounted and used as a block device.
func (r *rig) either(name string, size int64) *testVolume {
	r.t.Helper()
	req := r.createRequest(name, size, mountCapability(fsExt4))
	req.VolumeCapabilities = append(req.VolumeCapabilities, blockCapability(writer))
	return r.createFrom(req)
}

// asBlock runs a script on the volume's device, as a pod would that has it as a block device.
func (v *testVolume) asBlock(script string) {
	v.t.Helper()
	before := v.capability
	v.capability = blockCapability(writer)
	run(v.t, "bash", "-c", script, "block", v.publish("vm"))
	v.unstage("vm")
	v.capability = before
}

// wantIdle checks that nothing of a volume is attached or mounted.
func (v *testVolume) wantIdle() {
	v.t.Helper()
	if list, err := v.client.List(v.t.Context()); err != nil || len(list) > 0 {
		v.t.Errorf("attached: %v, %v", list, err)
	}
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(v.base))
	must(v.t, err)
	if len(infos) > 0 {
		v.t.Errorf("mounted: %v", infos[0])
	}
}

// TestBlockBesideMount: nobody writes to a device beside the file system that is mounted from it.
func TestBlockBesideMount(t *testing.T) {
	r := newRig(t)
	v := r.either("fs", 16*mib)
	path := v.publish("pod")
	must(t, os.WriteFile(filepath.Join(path, "file"), []byte("precious"), 0o644))
	v.capability = blockCapability(writer)
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(t.Context(), v.stageRequest()))
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(t.Context(), v.publishRequest("vm")))
	if got, err := os.ReadFile(filepath.Join(path, "file")); err != nil || string(got) != "precious" {
		t.Errorf("%q, %v", got, err)
	}
	v.unstage("pod")
	v.publish("vm")
	v.capability = mountCapability(fsExt4)
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(t.Context(), v.stageRequest()))
	v.unstage("vm")
	v.wantIdle()
	v.delete()
}

// TestModeIsKept: what was made as a block device is mounted only where a PersistentVolume says so.
func TestModeIsKept(t *testing.T) {
	r := newRig(t)
	v := r.create("disk", 16*mib, blockCapability(writer))
	v.asBlock(`mkfs.ext4 -q -F "$1"`)
	v.capability = mountCapability(fsExt4)
	wantCode(t, codes.FailedPrecondition)(r.NodeStageVolume(t.Context(), v.stageRequest()))
	wantCode(t, codes.AlreadyExists)(r.CreateVolume(t.Context(), r.createRequest("disk", 16*mib, v.capability)))
	ask := &csi.ValidateVolumeCapabilitiesRequest{VolumeId: v.id, VolumeCapabilities: []*csi.VolumeCapability{v.capability}}
	if a := ok[*csi.ValidateVolumeCapabilitiesResponse](t)(r.ValidateVolumeCapabilities(t.Context(), ask)); a.GetConfirmed() != nil {
		t.Error("it is said to be mountable")
	}
	v.wantIdle()
	allowed := v.stageRequest()
	allowed.VolumeContext = map[string]string{attributeModeChange: "true"}
	ok[*csi.NodeStageVolumeResponse](t)(r.NodeStageVolume(t.Context(), allowed))
	v.unstage()
	v.delete()
}

// TestHostileSuperblock: what a tenant has written to a superblock neither stops the node nor opens other devices.
func TestHostileSuperblock(t *testing.T) {
	r := newRig(t)
	for _, fsType := range []string{fsExt3, fsExt4} {
		v := r.either("panic-"+fsType, 16*mib)
		v.capability = mountCapability(fsType)
		v.asBlock(`mkfs.` + fsType + ` -q -F "$1" && tune2fs -e panic "$1" >/dev/null`)
		v.stage()
		infos, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(v.stagingPath()))
		must(t, err)
		if options := infos[0].VFSOptions; strings.Contains(options, "errors=panic") {
			t.Errorf("%s: mounted with %s", fsType, options)
		}
		v.unstage()
		v.delete()
	}
	v := r.either("options", 16*mib)
	v.asBlock(`mkfs.ext4 -q -F "$1" && tune2fs -E mount_opts=journal_path=/dev/loop0 "$1" >/dev/null`)
	v.refused(codes.FailedPrecondition, "journal_path")
	// The number of a journal's inode in the superblock.
	v.asBlock(`mkfs.ext4 -q -F -O ^metadata_csum "$1" && printf '\0\0\0\0\0\7\0\0' | dd of="$1" bs=1 seek=1248 conv=notrunc status=none`)
	v.refused(codes.FailedPrecondition, "on another device")
	v.delete()
}

// TestRevertKeepsSize: a volume that was expanded is as large as its claim after a revert to a smaller snapshot.
func TestRevertKeepsSize(t *testing.T) {
	r := newRig(t)
	for _, fsType := range []string{"", fsExt4} {
		c := blockCapability(writer)
		if fsType != "" {
			c = mountCapability(fsType)
		}
		v := r.create("disk"+fsType, 16*mib, c)
		path := v.publish("pod")
		if fsType == "" {
			run(t, "dd", "if=/dev/urandom", "of="+path, "bs=1M", "count=16", "oflag=direct", "status=none")
		}
		snap := v.snapshot("snap")
		if fsType == "" { // ext4 grows online only with CAP_SYS_RESOURCE
			v.expand(path, 64*mib)
			run(t, "dd", "if=/dev/urandom", "of="+path, "bs=1M", "count=16", "seek=40", "oflag=direct", "status=none")
		} else {
			_, _ = v.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
				VolumeId: v.id, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib},
			})
		}
		v.unstage("pod")
		run(t, "qemu-img", "snapshot", "-a", "snap", v.imagePath())
		got := ok[*csi.ControllerGetVolumeResponse](t)(r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.id}))
		if size := got.GetVolume().GetCapacityBytes(); size != 64*mib {
			t.Errorf("the controller says %d bytes", size)
		}
		path = v.publish("pod")
		list, err := r.client.List(t.Context())
		must(t, err)
		if out := run(t, "blockdev", "--getsize64", list[0].Device); out != "67108864\n" {
			t.Errorf("size after the revert: %s", out)
		}
		if fsType == "" {
			run(t, "cmp", "-n", "50331648", "-i", "16777216:0", path, "/dev/zero") // what is beyond reads as zeros
		} else if size := fileSystemSize(t, path); size < 50*mib {
			t.Errorf("the file system has %d bytes", size)
		}
		v.unstage("pod")
		v.delete()
		r.deleteSnapshots(snap)
	}
	r.wantEmpty()
}

// TestMountOptionsRefused: options that would mount anything else, or elsewhere, are refused by name.
func TestMountOptionsRefused(t *testing.T) {
	r := newRig(t)
	v := r.create("fs", 16*mib, mountCapability(fsExt4))
	for _, option := range []string{
		"loop", "loop=/dev/loop7", "noatime,bind", "rbind", "remount", "move", "offset=4096", "sizelimit=1", "rshared", "errors=panic",
		"X-mount.subdir=a", "logdev=/dev/loop1", "journal_path=/dev/loop1", "user",
	} {
		v.capability = mountCapability(fsExt4)
		v.capability.GetMount().MountFlags = []string{"noatime", option}
		_, err := r.NodeStageVolume(t.Context(), v.stageRequest())
		name, _, _ := strings.Cut(strings.TrimPrefix(option, "noatime,"), "=")
		if codeOfCall(err) != "InvalidArgument" || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", option, err)
		}
		wantCode(t, codes.InvalidArgument)(r.CreateVolume(t.Context(), r.createRequest("other", 16*mib, v.capability)))
	}
	v.capability.GetMount().MountFlags = []string{"no-such-option"}
	if _, err := r.NodeStageVolume(t.Context(), v.stageRequest()); err == nil {
		t.Error("mounted with an option that there is not")
	}
	v.wantIdle()
	v.capability.GetMount().MountFlags = []string{"noatime", "errors=continue"}
	v.stage()
	v.unstage()
	v.delete()
}

// TestTwoStagingPaths: a volume that is staged at two paths can be unstaged, in each order, and is detached behind the last.
func TestTwoStagingPaths(t *testing.T) {
	r := newRig(t)
	for _, order := range [][]string{{"first", "second"}, {"second", "first"}} {
		v := r.create("fs", 16*mib, mountCapability(fsExt4))
		at := map[string]string{"first": v.stagingPath(), "second": v.stagingPath() + "-second"}
		v.stage()
		second := v.stageRequest()
		second.StagingTargetPath = at["second"]
		ok[*csi.NodeStageVolumeResponse](t)(r.NodeStageVolume(t.Context(), second))
		path := v.publish("pod")
		first := &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: at["first"]}
		wantCode(t, codes.FailedPrecondition)(r.NodeUnstageVolume(t.Context(), first))
		must(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
		v.unpublish("pod")
		for _, which := range order {
			request := &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: at[which]}
			eventually(t, "it is unstaged", func() bool {
				_, err := r.NodeUnstageVolume(t.Context(), request)
				return err == nil
			})
		}
		v.wantIdle()
		v.stage() // and nothing is remembered
		v.unstage()
		v.delete()
	}
	r.wantEmpty()
}

// TestGrowthRefused: a restored file system that resize2fs does not grow can be used as it is.
func TestGrowthRefused(t *testing.T) {
	r := newRig(t)
	v := r.either("fs", 16*mib)
	// A compatible feature that e2fsprogs does not know is nothing to the kernel.
	v.asBlock(`mkfs.ext4 -q -F -O ^metadata_csum "$1" && printf '\200' | dd of="$1" bs=1 seek=1119 conv=notrunc status=none`)
	snap := v.snapshot("snap")
	restored := r.restore("restored", snap, 64*mib, mountCapability(fsExt4))
	must(t, os.WriteFile(filepath.Join(restored.publish("pod"), "file"), nil, 0o600))
	health := ok[*csi.NodeGetVolumeHealthResponse](t)(r.NodeGetVolumeHealth(t.Context(),
		&csi.NodeGetVolumeHealthRequest{VolumeId: restored.id}))
	if got := health.GetVolumeHealth().GetHealthStatuses(); len(got) != 1 || got[0].GetReason() != "FileSystemSmall" {
		t.Errorf("health: %v", got)
	}
	restored.unstage("pod")
	restored.delete()
	v.delete()
	r.deleteSnapshots(snap)
}

// TestFrozenUnstage: a file system that a pod has left frozen is unstaged all the same.
func TestFrozenUnstage(t *testing.T) {
	r := newRig(t)
	v := r.create("fs", 16*mib, mountCapability(fsExt4))
	path := v.publish("pod")
	device := ok[[]engine.Attachment](t)(r.client.List(t.Context()))[0].Device
	t.Cleanup(func() {
		if t.Failed() { // it would keep its device for good
			_ = exec.Command("sh", "-c", `mount "$1" "$2" && fsfreeze -u "$2"; umount "$2"`, "thaw", device, t.TempDir()).Run()
		}
	})
	run(t, "fsfreeze", "-f", path)
	v.unstage("pod")
	v.wantIdle()
	v.delete()
}

// TestLinkedTarget: what is published behind a symbolic link is unpublished there, and nothing else is.
func TestLinkedTarget(t *testing.T) {
	r := newRig(t)
	v, other := r.create("fs", 16*mib, mountCapability(fsExt4)), r.create("other", 16*mib, mountCapability(fsExt4))
	behind := filepath.Join(r.base, "real")
	must(t, os.Mkdir(behind, 0o700))
	must(t, os.MkdirAll(filepath.Dir(v.target("pod")), 0o700))
	must(t, os.Symlink(behind, v.target("pod")))
	v.publish("pod")
	v.publish("pod") // again
	must(t, os.WriteFile(filepath.Join(behind, "file"), nil, 0o600))
	v.unpublish("pod")
	if _, err := os.Stat(filepath.Join(behind, "file")); err == nil {
		t.Error("the volume is still mounted behind the link")
	}
	path := other.publish("pod")
	must(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
	must(t, os.Symlink(path, v.target("pod")))
	if _, err := r.NodeUnpublishVolume(t.Context(),
		&csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target("pod")}); err == nil {
		t.Error("another volume's mount was taken for this one's")
	}
	if _, err := os.Stat(filepath.Join(path, "file")); err != nil {
		t.Errorf("another pod lost its volume: %v", err)
	}
	v.unstage()
	other.unstage("pod")
	v.delete()
	other.delete()
}

// TestSmallest: the smallest volume of each file system can be mounted.
func TestSmallest(t *testing.T) {
	r := newRig(t)
	for fsType, want := range map[string]int64{fsExt4: minVolumeSize, fsExt3: minExt3Size, fsXFS: minXFSSize} {
		v := r.create("small-"+fsType, 1, mountCapability(fsType))
		if v.size != want {
			t.Errorf("%s: %d bytes, want %d", fsType, v.size, want)
		}
		must(t, os.WriteFile(filepath.Join(v.publish("pod"), "file"), nil, 0o600))
		v.unstage("pod")
		v.delete()
	}
	request := r.createRequest("too-small", 1*mib, mountCapability(fsExt3))
	request.CapacityRange.LimitBytes = 1 * mib
	wantCode(t, codes.OutOfRange)(r.CreateVolume(t.Context(), request))
}

// expandingEngine expands a volume just before it is cloned.
type expandingEngine struct{ Engine }

func (e expandingEngine) Clone(ctx context.Context, id, snapshot, target string, size int64) error {
	if _, err := e.Resize(ctx, id, size+16*mib, size+16*mib); err != nil {
		return err
	}
	return e.Engine.Clone(ctx, id, snapshot, target, size)
}

// TestCloneMeetsExpansion: a clone whose source grows meanwhile is asked for again.
func TestCloneMeetsExpansion(t *testing.T) {
	r := newRig(t)
	v := r.create("disk", 16*mib, blockCapability(writer))
	v.stage()
	r.stop()
	r.startPlugin(Options{Engine: expandingEngine{r.client}})
	clone := r.createRequest("clone", 0, blockCapability(writer))
	clone.VolumeContentSource = contentSourceMessage("volume:" + v.id)
	wantCode(t, codes.Aborted)(r.CreateVolume(t.Context(), clone))
	r.stop()
	r.startPlugin(Options{})
	if cloned := r.createFrom(clone); cloned.size != 32*mib {
		t.Errorf("the clone has %d bytes", cloned.size)
	}
	v.unstage()
	v.delete()
}

// TestGrowthOnFullPool: what a full pool does not let grow can be used as it is, and grows when there is room.
func TestGrowthOnFullPool(t *testing.T) {
	r := newSmallRig(t, 512*mib, Options{Overcommit: 100})
	source := r.create("source", 1, mountCapability(fsXFS))
	must(t, os.WriteFile(filepath.Join(source.publish("pod"), "file"), []byte("precious"), 0o644))
	snap := source.snapshot("snap")
	source.unstage("pod")
	restored := r.restore("restored", snap, 16*gib, mountCapability(fsXFS))
	fillUp(t, r.dir)
	restored.stage()
	if got, err := os.ReadFile(filepath.Join(restored.stagingPath(), "file")); err != nil || string(got) != "precious" {
		t.Errorf("%q, %v", got, err)
	}
	if size := fileSystemSize(t, restored.stagingPath()); size > gib {
		t.Errorf("it grew to %d bytes: the pool was not full", size)
	}
	restored.unstage()
	must(t, os.Remove(filepath.Join(r.dir, "last")))
	path := restored.publish("pod")
	if size := fileSystemSize(t, path); size < 15*gib {
		t.Errorf("with room again: %d bytes", size)
	}
	restored.unstage("pod")
	restored.delete()
	source.delete()
	r.deleteSnapshots(snap)
}

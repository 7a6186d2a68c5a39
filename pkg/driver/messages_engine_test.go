package driver

import (
	"os"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// saidOfHealth checks what a volume's health says, and an Event on its claim.
func (r *rig) saidOfHealth(id, reason, quote string) {
	r.t.Helper()
	r.awaitReasons(id, reason)
	health := ok[*csi.NodeGetVolumeHealthResponse](r.t)(r.NodeGetVolumeHealth(r.t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id}))
	for _, entry := range health.GetVolumeHealth().GetHealthStatuses() {
		r.quoted(entry.GetMessage(), quote)
	}
}

// TestMessagesOfEngine: what the engine says of a volume whose worker is in trouble, in answers and in the volume's health.
func TestMessagesOfEngine(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("v", 64*mib, blockCapability(writer))
	v.publish("vm")
	unstage := func() error {
		_, err := r.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.stagingPath()})
		return err
	}
	stage := func() error { _, err := r.NodeStageVolume(ctx, v.stageRequest()); return err }
	publish := func() error { _, err := r.NodePublishVolume(ctx, v.publishRequest("vm")); return err }
	snapshot := func() error {
		_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: v.id})
		return err
	}
	opened, err := os.Open(v.device().Device)
	must(t, err)
	v.unpublish("vm")
	r.said(unstage(), codes.FailedPrecondition, "something on the node has … open")
	must(t, opened.Close())

	worker := r.workerPID(v.id)
	must(t, unix.Kill(worker, unix.SIGSTOP))
	const stopped = "its worker has not answered for …: it is stopped, or waits for the pool's disk"
	r.saidOfHealth(v.id, "IOStalled", stopped)
	r.said(stage(), codes.Unavailable, stopped)
	must(t, unix.Kill(worker, unix.SIGCONT))
	r.awaitReasons(v.id)

	// Its worker dies, and no other can start.
	lease := r.killForGood(v.id)
	r.saidOfHealth(v.id, "WorkerReplaced", "its worker has died (killed)")
	for _, call := range []func() error{stage, unstage, snapshot} {
		r.said(call(), codes.Unavailable, "another worker is being started for it: …")
	}
	r.said(publish(), codes.Unavailable, "its worker has died (killed)")
	must(t, lease.Unlock())
	r.awaitReasons(v.id)

	// All die that served it.
	v.publish("vm")
	tenant := v.enter("vm")
	tenant.do("write 161")
	r.killAll(v)
	r.startEngine()
	r.saidOfHealth(v.id, "VolumeFailed", "all that served its device has died")
	r.said(publish(), codes.FailedPrecondition, "has failed, end the pods that use it, so that it is staged again")
	v.unpublish("vm")
	r.said(unstage(), codes.FailedPrecondition, "is dead, and something on the node has it open")
	tenant.leave()
	v.unstage()
	v.delete()
}

// TestMessagesOfFreezing: a file system that cannot be frozen.
func TestMessagesOfFreezing(t *testing.T) {
	r := newRig(t)
	v := r.create("v", 64*mib, mountCapability(fsExt4))
	mounted, err := os.Open(v.publish("pod"))
	must(t, err)
	const extShutdown, withoutJournal = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
	must(t, unix.IoctlSetPointerInt(int(mounted.Fd()), extShutdown, withoutJournal))
	must(t, mounted.Close())
	_, err = r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: v.id})
	r.said(err, codes.Aborted, "file system was not frozen")
	v.unstage("pod")
	v.delete()
}

// TestMessagesOfContent: what a volume holds, or is used as, keeps it from being mounted.
func TestMessagesOfContent(t *testing.T) {
	r := newRig(t)
	v := r.createFrom(&csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * mib},
		VolumeCapabilities: []*csi.VolumeCapability{blockCapability(writer), mountCapability(fsExt4)},
	})
	write := func(script string) {
		run(t, "bash", "-c", script, "write", v.publish("vm"))
		v.unstage("vm")
	}
	said := func(code codes.Code, fsType, quote string) {
		t.Helper()
		q := v.stageRequest()
		q.VolumeCapability = mountCapability(fsType)
		_, err := r.NodeStageVolume(t.Context(), q)
		r.said(err, code, quote)
	}
	v.publish("vm")
	said(codes.FailedPrecondition, fsExt4, "the volume is in use as a block device: … is bound to …")
	v.unstage("vm")
	write(`head -c 1M /dev/urandom | dd of="$1" bs=1M oflag=direct status=none`)
	said(codes.FailedPrecondition, fsExt4, "data in which no file system is recognised; it is not formatted")
	write(`mkfs.ext4 -q -F "$1"`)
	said(codes.FailedPrecondition, fsXFS, "the volume holds …; it is not formatted")

	q := v.stageRequest()
	q.VolumeCapability = mountCapability(fsExt4)
	_, err := r.NodeStageVolume(t.Context(), q)
	must(t, err)
	_, err = r.NodeStageVolume(t.Context(), v.stageRequest())
	r.said(err, codes.FailedPrecondition, "the volume is in use as a file system, at …")
	v.unstage()
	_, err = r.NodePublishVolume(t.Context(), v.publishRequest("vm"))
	r.said(err, codes.FailedPrecondition, "it is not staged")

	must(t, os.Mkdir(v.stagingPath()+".other", 0o755))
	run(t, "mount", "-t", "tmpfs", "none", v.stagingPath()+".other")
	q.StagingTargetPath += ".other"
	_, err = r.NodeStageVolume(t.Context(), q)
	r.said(err, codes.FailedPrecondition, "something else is mounted at …")
	run(t, "umount", v.stagingPath()+".other")
	v.unstage()
	v.delete()
	blank := r.create("blank", 32*mib, mountCapability(fsExt4))
	blank.capability.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	_, err = r.NodeStageVolume(t.Context(), blank.stageRequest())
	r.said(err, codes.FailedPrecondition, "the volume is blank, and read-only")
	blank.delete()
}

// TestMessagesOfFullPool: a snapshot that the pool, or the volume's limit, has no room for.
func TestMessagesOfFullPool(t *testing.T) {
	r := newSmallRig(t, 192*mib, Options{})
	ctx := t.Context()
	q := r.createRequest("limited", 32*mib, blockCapability(writer))
	q.Parameters = map[string]string{"snapshotLimit": "0%"}
	v := r.createFrom(q)
	fill := func() {
		run(t, "dd", "if=/dev/urandom", "of="+v.target("vm"), "bs=1M", "count=32", "oflag=direct", "status=none")
	}
	v.publish("vm")
	fill()
	_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: v.id})
	r.said(err, codes.ResourceExhausted, "which its snapshots would keep; they may keep …")
	v.unstage("vm")
	v.delete()

	v = r.create("v", 160*mib, blockCapability(writer))
	v.publish("vm")
	fill()
	_, err = r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: v.id})
	r.said(err, codes.ResourceExhausted, "a snapshot keeps what its volume overwrites")
	v.unstage("vm")
	v.delete()
}

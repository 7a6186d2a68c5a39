package driver

import (
	"fmt"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// engineQuestion is how long the engine waits for the answer of a worker, and so the least that a call takes which waits for one
// that is hung.
const engineQuestion = 5 * time.Second

// A volume whose worker does not answer holds up no call about another one, nor a list.
func TestHungNeighbour(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("disk", 64*mib, mountCapability(fsExt4))
	hung := r.create("hung", 32*mib, blockCapability(writer))
	hung.stage()
	kept := hung.snapshot("kept")
	v.stage()
	pid := r.workerPID(hung.id)
	must(t, unix.Kill(pid, unix.SIGSTOP))
	defer func() { _ = unix.Kill(pid, unix.SIGCONT) }()

	calls := 0
	for _, step := range []struct {
		what string
		call func() error
	}{
		{"snapshot", func() error {
			calls++
			_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: fmt.Sprint("s", calls), SourceVolumeId: v.id})
			return err
		}},
		{"publish", func() error { _, err := r.NodePublishVolume(ctx, v.publishRequest("pod")); return err }},
		{"stats", func() error {
			_, err := r.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target("pod")})
			return err
		}},
		{"health", func() error {
			_, err := r.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
			return err
		}},
		{"health of the hung one", func() error {
			r.reasons(hung.id)
			return nil
		}},
		{"list of volumes", func() error {
			list, err := r.ListVolumes(ctx, &csi.ListVolumesRequest{})
			if n := len(list.GetEntries()); err == nil && n != 2 {
				t.Errorf("%d volumes are listed", n)
			}
			return err
		}},
		{"list of snapshots", func() error {
			_, err := r.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
			return err
		}},
		{"list of health", func() error {
			_, err := r.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
			return err
		}},
		{"unpublish", func() error { return unpublish(v) }},
		{"unstage", func() error {
			v.unstage()
			return nil
		}},
		{"stage", func() error { _, err := r.NodeStageVolume(ctx, v.stageRequest()); return err }},
	} {
		var took time.Duration
		for range 3 { // a busy machine may need as long
			start := time.Now()
			must(t, step.call())
			if took = time.Since(start); took < engineQuestion {
				break
			}
		}
		t.Logf("%s: %s", step.what, took)
		if took >= engineQuestion {
			t.Errorf("%s waits for another volume: %s", step.what, took)
		}
	}
	r.awaitReasons(hung.id, "IOStalled")

	must(t, unix.Kill(pid, unix.SIGCONT))
	r.awaitReasons(hung.id)
	list := ok[*csi.ListSnapshotsResponse](t)(r.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: hung.id}))
	if n := len(list.GetEntries()); n != 1 || list.GetEntries()[0].GetSnapshot().GetSnapshotId() != kept {
		t.Errorf("the snapshots of the volume that hung: %v", list)
	}
	for _, volume := range []*testVolume{v, hung} {
		volume.unstage()
		volume.delete()
	}
}

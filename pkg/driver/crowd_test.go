package driver

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// TestCrowd: pods that come and go at once, with snapshots and copies, while others list. What one is told to
// try again succeeds.
func TestCrowd(t *testing.T) {
	r := newRig(t)
	var crowd, lister sync.WaitGroup
	done := make(chan struct{})
	lister.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			_, errs := r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
			_, errv := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
			_, errc := r.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
			for _, err := range []error{errs, errv, errc} {
				if err != nil && codeOfCall(err) != codes.Aborted.String() {
					t.Error(err)
				}
			}
		}
	})
	for i := range 4 {
		crowd.Go(func() {
			for j := range 2 {
				if err := r.oneLife(fmt.Sprintf("pvc-%d-%d", i, j)); err != nil {
					t.Errorf("pod %d: %v", i, err)
				}
			}
		})
	}
	crowd.Wait()
	close(done)
	lister.Wait()
	r.wantEmpty()
}

// oneLife is a volume from its creation to its end, with a snapshot and a copy.
func (r *rig) oneLife(name string) error {
	ctx := r.t.Context()
	c := blockCapability(writer)
	v, copied := &testVolume{rig: r, capability: c}, &testVolume{rig: r, capability: c}
	var snap string
	for _, step := range []func() error{
		func() error {
			resp, err := r.CreateVolume(ctx, r.createRequest(name, 32*mib, c))
			v.id = resp.GetVolume().GetVolumeId()
			return err
		},
		func() error { _, err := r.NodeStageVolume(ctx, v.stageRequest()); return err },
		func() error { _, err := r.NodePublishVolume(ctx, v.publishRequest("pod")); return err },
		func() error {
			resp, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "of-" + name, SourceVolumeId: v.id})
			snap = resp.GetSnapshot().GetSnapshotId()
			return err
		},
		func() error {
			req := r.createRequest("copy-"+name, 48*mib, c)
			req.VolumeContentSource = contentSourceMessage("snapshot:" + snap)
			resp, err := r.CreateVolume(ctx, req)
			copied.id = resp.GetVolume().GetVolumeId()
			return err
		},
		func() error { _, err := r.NodeStageVolume(ctx, copied.stageRequest()); return err },
		func() error { return unpublish(v) },
		func() error { return unstage(v) },
		func() error { _, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}); return err },
		func() error {
			_, err := r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap})
			return err
		},
		func() error { return unstage(copied) },
		func() error { _, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: copied.id}); return err },
	} {
		if err := r.insist(step); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func unpublish(v *testVolume) error {
	_, err := v.NodeUnpublishVolume(v.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target("pod")})
	return err
}

func unstage(v *testVolume) error {
	_, err := v.NodeUnstageVolume(v.t.Context(),
		&csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.stagingPath()})
	return err
}

// insist repeats a call as the sidecars do.
func (r *rig) insist(call func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for {
		err := call()
		if code := codeOfCall(err); code != codes.Aborted.String() && code != codes.FailedPrecondition.String() {
			return err
		}
		select {
		case <-tick.C:
		case <-deadline:
			return err
		}
	}
}

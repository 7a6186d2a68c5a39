package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const writer = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER

// foreign returns an ID that another node's pool has made.
func foreign(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, pool.Init(dir))
	p, err := pool.Open(dir)
	must(t, err)
	return p.NewID("pvc-elsewhere")
}

func TestVolumesOfOtherNodes(t *testing.T) {
	r := newRig(t)
	id := foreign(t)
	ctx := t.Context()
	wantCode(t, codes.FailedPrecondition)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}))
	wantCode(t, codes.FailedPrecondition)(r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id + "@snap"}))
	for _, source := range []string{"volume:" + id, "snapshot:" + id + "@snap"} {
		req := r.createRequest("copy", gib, blockCapability(writer))
		req.VolumeContentSource = contentSourceMessage(source)
		wantCode(t, codes.ResourceExhausted)(r.CreateVolume(ctx, req))
	}
	req := r.createRequest("there", gib, blockCapability(writer))
	req.AccessibilityRequirements = &csi.TopologyRequirement{
		Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "node-b"}}},
	}
	wantCode(t, codes.ResourceExhausted)(r.CreateVolume(ctx, req))
	left := ok[*csi.GetCapacityResponse](t)(r.GetCapacity(ctx,
		&csi.GetCapacityRequest{AccessibleTopology: req.GetAccessibilityRequirements().GetRequisite()[0]}))
	if left.GetAvailableCapacity() != 0 {
		t.Errorf("capacity of another node: %d", left.GetAvailableCapacity())
	}
	for _, filter := range []*csi.ListSnapshotsRequest{{SnapshotId: id + "@snap"}, {SourceVolumeId: id}} {
		if list := ok[*csi.ListSnapshotsResponse](t)(r.ListSnapshots(ctx, filter)); len(list.GetEntries()) > 0 {
			t.Errorf("%v lists %v", filter, list)
		}
	}
	r.wantEmpty()
}

func TestIDsThatAreNotOurs(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	p, err := pool.Open(r.dir)
	must(t, err)
	for _, id := range []string{
		"../../etc", "..", "/", "a/b", "x\x00y", strings.Repeat("x", 4096), "pvc", p.NewID("gone"), "../volumes/" + p.NewID("gone"),
	} {
		ok[*csi.DeleteVolumeResponse](t)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}))
		for _, snapshot := range []string{id, id + "@", id + "@snap", id + "@~00"} {
			ok[*csi.DeleteSnapshotResponse](t)(r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshot}))
			wantCode(t, codes.NotFound)(r.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: snapshot}))
		}
		v := &testVolume{rig: r, id: id, capability: mountCapability("")}
		stage, publish := v.stageRequest(), v.publishRequest("pod")
		stage.StagingTargetPath, publish.StagingTargetPath, publish.TargetPath = r.base+"/s", r.base+"/s", r.base+"/t"
		wantCode(t, codes.NotFound)(r.NodeStageVolume(ctx, stage))
		wantCode(t, codes.NotFound)(r.NodePublishVolume(ctx, publish))
		ok[*csi.NodeUnpublishVolumeResponse](t)(r.NodeUnpublishVolume(ctx,
			&csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: r.base + "/t"}))
		ok[*csi.NodeUnstageVolumeResponse](t)(r.NodeUnstageVolume(ctx,
			&csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: r.base + "/s"}))
		wantCode(t, codes.NotFound)(r.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: r.base}))
		wantCode(t, codes.NotFound)(r.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: r.base}))
		wantCode(t, codes.NotFound)(r.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id}))
		wantCode(t, codes.NotFound)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id}))
	}
}

func TestCreateVolumeIsIdempotent(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	req := r.createRequest("pvc-1", 64*mib, blockCapability(writer))
	first := r.createFrom(req)
	if again := r.createFrom(req); again.id != first.id || again.size != first.size {
		t.Errorf("made %s, then %s", first.id, again.id)
	}
	for name, change := range map[string]func(*csi.CreateVolumeRequest){
		"size":    func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = 65 * mib },
		"limit":   func(q *csi.CreateVolumeRequest) { q.CapacityRange = &csi.CapacityRange{LimitBytes: 63 * mib} },
		"cluster": func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"clusterSize": "128K"} },
		"source":  func(q *csi.CreateVolumeRequest) { q.VolumeContentSource = contentSourceMessage("volume:" + first.id) },
	} {
		other := r.createRequest("pvc-1", 64*mib, blockCapability(writer))
		change(other)
		if _, err := r.CreateVolume(ctx, other); codeOfCall(err) != codes.AlreadyExists.String() {
			t.Errorf("another %s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*csi.CreateVolumeRequest){
		"parameter": func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"speed": "fast"} },
		"mutable":   func(q *csi.CreateVolumeRequest) { q.MutableParameters = map[string]string{"iops": "1"} },
		"mode": func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities = []*csi.VolumeCapability{blockCapability(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}
		},
	} {
		other := r.createRequest("pvc-2", 64*mib, blockCapability(writer))
		change(other)
		if _, err := r.CreateVolume(ctx, other); codeOfCall(err) != codes.InvalidArgument.String() {
			t.Errorf("%s: %v", name, err)
		}
	}
	first.delete()
	r.wantEmpty()
}

// TestConcurrentCalls: calls that ask for the same at once give one volume and one snapshot, and each
// answers the same or ABORTED.
func TestConcurrentCalls(t *testing.T) {
	r := newRig(t)
	source := r.create("source", 64*mib, blockCapability(writer))
	snap := source.snapshot("snap")
	source.stage()
	req := r.createRequest("copy", 64*mib, blockCapability(writer))
	req.VolumeContentSource = contentSourceMessage("snapshot:" + snap)

	ids := atOnce(t, func(ctx context.Context) (string, error) {
		resp, err := r.CreateVolume(ctx, req)
		return resp.GetVolume().GetVolumeId(), err
	})
	if len(ids) != 1 {
		t.Errorf("volumes: %v", ids)
	}
	snaps := atOnce(t, func(ctx context.Context) (string, error) {
		resp, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap-2", SourceVolumeId: source.id})
		return resp.GetSnapshot().GetSnapshotId(), err
	})
	if len(snaps) != 1 {
		t.Errorf("snapshots: %v", snaps)
	}
	atOnce(t, func(ctx context.Context) (string, error) {
		_, err := r.NodePublishVolume(ctx, source.publishRequest("pod"))
		return "", err
	})
	if at, err := mountAt(source.target("pod")); err != nil || at == nil {
		t.Errorf("published: %v, %v", at, err)
	}
	source.unstage("pod")
	atOnce(t, func(ctx context.Context) (string, error) {
		_, err := r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snaps[0]})
		return "", err
	})
	r.deleteSnapshots(snap)
	atOnce(t, func(ctx context.Context) (string, error) {
		_, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: source.id})
		return "", err
	})
	(&testVolume{rig: r, id: ids[0]}).delete()
	r.wantEmpty()
}

// atOnce makes eight calls at once and returns the different answers. At least one must succeed; the others may
// be ABORTED.
func atOnce(t *testing.T, call func(context.Context) (string, error)) []string {
	t.Helper()
	const n = 8
	answers, errs := make([]string, n), make([]error, n)
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { answers[i], errs[i] = call(t.Context()) })
	}
	calls.Wait()
	var good []string
	succeeded := 0
	for i, err := range errs {
		if err == nil {
			succeeded++
			good = append(good, answers[i])
		} else if codeOfCall(err) != codes.Aborted.String() {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if succeeded == 0 {
		t.Fatalf("no call succeeded: %v", errors.Join(errs...))
	}
	slices.Sort(good)
	return slices.Compact(good)
}

func TestCopyParameters(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	req := r.createRequest("source", 64*mib, blockCapability(writer))
	req.Parameters = map[string]string{"clusterSize": "128K"}
	source := r.createFrom(req)
	snap := source.snapshot("snap")
	for i, size := range []int64{0, 64 * mib, 65*mib + 1} {
		for _, from := range []string{"snapshot:" + snap, "volume:" + source.id} {
			copied := r.createRequest(fmt.Sprint("copy", i, from[:4]), size, blockCapability(writer))
			copied.VolumeContentSource = contentSourceMessage(from)
			v := r.createFrom(copied)
			if want := max(64*mib, roundUp(size)); v.size != want {
				t.Errorf("copy of %s has %d bytes, want %d", from, v.size, want)
			}
			if info := run(t, "qemu-img", "info", "--output=json", r.dir+"/volumes/"+v.id+"/image.qcow2"); !strings.Contains(info, `"cluster-size": 131072`) {
				t.Errorf("copy of %s: %s", from, info)
			}
			v.delete()
		}
	}
	bad := r.createRequest("bad", 63*mib, blockCapability(writer))
	bad.VolumeContentSource = contentSourceMessage("snapshot:" + snap)
	wantCode(t, codes.OutOfRange)(r.CreateVolume(ctx, bad))
	bad.CapacityRange = &csi.CapacityRange{LimitBytes: 63 * mib}
	wantCode(t, codes.OutOfRange)(r.CreateVolume(ctx, bad))
	bad.CapacityRange, bad.Parameters = nil, map[string]string{"clusterSize": "64K"}
	wantCode(t, codes.InvalidArgument)(r.CreateVolume(ctx, bad))
	source.delete() // a tombstone now
	gone := r.createRequest("gone", 0, blockCapability(writer))
	gone.VolumeContentSource = contentSourceMessage("volume:" + source.id)
	wantCode(t, codes.NotFound)(r.CreateVolume(ctx, gone))
	wantCode(t, codes.NotFound)(r.NodeStageVolume(ctx, source.stageRequest()))
	wantCode(t, codes.NotFound)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "late", SourceVolumeId: source.id}))
	if again := ok[*csi.CreateSnapshotResponse](t)(r.CreateSnapshot(ctx,
		&csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: source.id})); again.GetSnapshot().GetSnapshotId() != snap {
		t.Errorf("a repeated call for a tombstone's snapshot: %v", again)
	}
	r.deleteSnapshots(snap)
	r.wantEmpty()
}

func TestListingPages(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	var volumes, snapshots []string
	var made []*testVolume
	for i := range 3 {
		v := r.create(fmt.Sprint("v", i), mib, blockCapability(writer))
		made, volumes = append(made, v), append(volumes, v.id)
		for j := range 2 {
			snapshots = append(snapshots, v.snapshot(fmt.Sprintf("s%d-%d", i, j)))
		}
	}
	snapshots = append(snapshots, made[0].snapshot(strings.Repeat("n", 200)))
	slices.Sort(volumes)
	slices.Sort(snapshots)

	var got []string
	for next := ""; ; {
		resp := ok[*csi.ListVolumesResponse](t)(r.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 2, StartingToken: next}))
		for _, e := range resp.GetEntries() {
			got = append(got, e.GetVolume().GetVolumeId())
		}
		if next = resp.GetNextToken(); next == "" {
			break
		}
	}
	if !slices.Equal(got, volumes) {
		t.Errorf("volumes %v, want %v", got, volumes)
	}
	got = nil
	for next := ""; ; {
		resp := ok[*csi.ListSnapshotsResponse](t)(r.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: 3, StartingToken: next}))
		if n := len(resp.GetEntries()); n == 0 || n > 3 {
			t.Fatalf("a page of %d", n)
		}
		for _, e := range resp.GetEntries() {
			got = append(got, e.GetSnapshot().GetSnapshotId())
		}
		if next = resp.GetNextToken(); next == "" {
			break
		}
	}
	if !slices.Equal(got, snapshots) {
		t.Errorf("snapshots %v, want %v", got, snapshots)
	}
	for _, id := range snapshots {
		one := ok[*csi.ListSnapshotsResponse](t)(r.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id}))
		if len(one.GetEntries()) != 1 || one.GetEntries()[0].GetSnapshot().GetSnapshotId() != id {
			t.Errorf("listing of %s: %v", id, one)
		}
		ok[*csi.GetSnapshotResponse](t)(r.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id}))
	}
	wantCode(t, codes.AlreadyExists)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s0-0", SourceVolumeId: made[1].id}))
	wantCode(t, codes.Aborted)(r.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: token("snapshot", "x")}))
	for _, v := range made {
		v.delete()
	}
	r.deleteSnapshots(snapshots...)
	r.wantEmpty()
}

// TestNoPool: a directory that is no pool, because its disk is not mounted, answers UNAVAILABLE, and nothing is
// written there.
func TestNoPool(t *testing.T) {
	r := newIdleRig(t)
	r.startEngine()
	r.startPlugin(Options{})
	ctx := t.Context()
	r.wantUnready("PoolNotReady")
	wantCode(t, codes.Unavailable)(r.CreateVolume(ctx, r.createRequest("pvc", gib, blockCapability(writer))))
	wantCode(t, codes.Unavailable)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: foreign(t)}))
	wantCode(t, codes.Unavailable)(r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: foreign(t) + "@s"}))
	wantCode(t, codes.Unavailable)(r.ListVolumes(ctx, &csi.ListVolumesRequest{}))
	wantCode(t, codes.Unavailable)(r.ListSnapshots(ctx, &csi.ListSnapshotsRequest{}))
	wantCode(t, codes.Unavailable)(r.GetCapacity(ctx, &csi.GetCapacityRequest{}))
	entries, err := os.ReadDir(r.dir)
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("created in the empty directory: %v", entries)
	}

	must(t, pool.Init(r.dir)) // the disk is there now
	r.awaitReady()
	v := r.create("pvc", 64*mib, blockCapability(writer))

	must(t, os.Rename(r.dir, r.dir+".away")) // and gone again
	must(t, os.Mkdir(r.dir, 0o700))
	r.wantUnready("PoolNotReady")
	wantCode(t, codes.Unavailable)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}))
	must(t, os.Remove(r.dir)) // it is still empty
	must(t, os.Rename(r.dir+".away", r.dir))
	v.delete()
	r.wantEmpty()
}

// A snapshot that was answered early and lost since is neither taken again nor forgotten, until it is deleted.
func TestLostSnapshot(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("v", 8*mib, blockCapability(writer))
	p, err := pool.Open(r.dir)
	must(t, err)
	for _, state := range []string{"detached", "attached"} {
		if state == "attached" {
			v.publish("pod")
		}
		must(t, p.AddPendingSnapshot(v.id, pool.PendingSnapshot{Name: state, Created: time.Now()}))
		req := &csi.CreateSnapshotRequest{Name: state, SourceVolumeId: v.id}
		wantCode(t, codes.Internal)(r.CreateSnapshot(ctx, req))
		other := v.snapshot("another " + state)
		id := snapshotID(v.id, state)
		r.deleteSnapshots(id)
		if got := v.snapshot(state); got != id {
			t.Errorf("%s: snapshot %s, want %s", state, got, id)
		}
		r.deleteSnapshots(id, other)
	}
	v.unstage("pod")
	v.delete()
	r.wantEmpty()
}

package driver

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// testVolume is a volume and the paths where a test stages and publishes it.
type testVolume struct {
	*rig
	id         string
	size       int64
	capability *csi.VolumeCapability
}

func (r *rig) createRequest(name string, size int64, c *csi.VolumeCapability) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{c},
	}
}

// create makes an empty volume.
func (r *rig) create(name string, size int64, c *csi.VolumeCapability) *testVolume {
	r.t.Helper()
	return r.createFrom(r.createRequest(name, size, c))
}

func (r *rig) createFrom(req *csi.CreateVolumeRequest) *testVolume {
	r.t.Helper()
	v := ok[*csi.CreateVolumeResponse](r.t)(r.CreateVolume(r.t.Context(), req)).GetVolume()
	if got := v.GetAccessibleTopology(); len(got) != 1 || got[0].GetSegments()[TopologyKey] != testNode {
		r.t.Errorf("topology of %s: %v", v.GetVolumeId(), got)
	}
	return &testVolume{rig: r, id: v.GetVolumeId(), size: v.GetCapacityBytes(), capability: req.GetVolumeCapabilities()[0]}
}

// restore makes a volume from a snapshot.
func (r *rig) restore(name, snapshotID string, size int64, c *csi.VolumeCapability) *testVolume {
	r.t.Helper()
	req := r.createRequest(name, size, c)
	req.VolumeContentSource = contentSourceMessage("snapshot:" + snapshotID)
	return r.createFrom(req)
}

func (v *testVolume) stagingPath() string { return filepath.Join(v.base, "staging", v.id) }
func (v *testVolume) target(name string) string {
	return filepath.Join(v.base, "pods", name, v.id)
}

func (v *testVolume) stageRequest() *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.stagingPath(), VolumeCapability: v.capability,
	}
}

func (v *testVolume) publishRequest(pod string) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.stagingPath(), TargetPath: v.target(pod), VolumeCapability: v.capability,
	}
}

func (v *testVolume) stage() {
	v.t.Helper()
	ok[*csi.NodeStageVolumeResponse](v.t)(v.NodeStageVolume(v.t.Context(), v.stageRequest()))
}

// publish stages the volume and publishes it, and returns the path in the pod.
func (v *testVolume) publish(pod string) string {
	v.t.Helper()
	v.stage()
	ok[*csi.NodePublishVolumeResponse](v.t)(v.NodePublishVolume(v.t.Context(), v.publishRequest(pod)))
	return v.target(pod)
}

func (v *testVolume) unpublish(pods ...string) {
	v.t.Helper()
	for _, pod := range pods {
		ok[*csi.NodeUnpublishVolumeResponse](v.t)(v.NodeUnpublishVolume(v.t.Context(),
			&csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(pod)}))
		if _, err := os.Lstat(v.target(pod)); err == nil {
			v.t.Errorf("%s is still there", v.target(pod))
		}
	}
}

// unstage takes the volume from its pods and the node. The kernel may hold a device for a moment after its
// last user is gone: kubelet repeats the call too.
func (v *testVolume) unstage(pods ...string) {
	v.t.Helper()
	v.unpublish(pods...)
	var err error
	eventually(v.t, "the volume is unstaged", func() bool {
		_, err = v.NodeUnstageVolume(v.t.Context(),
			&csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.stagingPath()})
		return err == nil || codeOfCall(err) != "FailedPrecondition"
	})
	must(v.t, err)
}

func (v *testVolume) delete() {
	v.t.Helper()
	ok[*csi.DeleteVolumeResponse](v.t)(v.DeleteVolume(v.t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id}))
}

// snapshot takes a snapshot and returns its ID.
func (v *testVolume) snapshot(name string) string {
	v.t.Helper()
	var s *csi.Snapshot
	eventually(v.t, "the snapshot is ready", func() bool { // the sidecar repeats the call too
		s = ok[*csi.CreateSnapshotResponse](v.t)(v.CreateSnapshot(v.t.Context(),
			&csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})).GetSnapshot()
		return s.GetReadyToUse()
	})
	if s.GetSourceVolumeId() != v.id || s.GetSizeBytes() == 0 || s.GetCreationTime().AsTime().IsZero() {
		v.t.Errorf("snapshot %v", s)
	}
	return s.GetSnapshotId()
}

func (r *rig) deleteSnapshots(ids ...string) {
	r.t.Helper()
	for _, id := range ids {
		ok[*csi.DeleteSnapshotResponse](r.t)(r.DeleteSnapshot(r.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id}))
	}
}

func (v *testVolume) expand(path string, size int64) int64 {
	v.t.Helper()
	return ok[*csi.NodeExpandVolumeResponse](v.t)(v.NodeExpandVolume(v.t.Context(), &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: path, StagingTargetPath: v.stagingPath(),
		CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})).GetCapacityBytes()
}

func (r *rig) volumeIDs() []string {
	r.t.Helper()
	var ids []string
	for _, e := range ok[*csi.ListVolumesResponse](r.t)(r.ListVolumes(r.t.Context(), &csi.ListVolumesRequest{})).GetEntries() {
		ids = append(ids, e.GetVolume().GetVolumeId())
	}
	return ids
}

func (r *rig) snapshotIDs() []string {
	r.t.Helper()
	list := ok[*csi.ListSnapshotsResponse](r.t)(r.ListSnapshots(r.t.Context(), &csi.ListSnapshotsRequest{}))
	var ids []string
	for _, e := range list.GetEntries() {
		ids = append(ids, e.GetSnapshot().GetSnapshotId())
	}
	return ids
}

// wantEmpty checks that nothing is left in the pool.
func (r *rig) wantEmpty() {
	r.t.Helper()
	entries, err := os.ReadDir(filepath.Join(r.dir, "volumes"))
	must(r.t, err)
	if len(entries) > 0 || len(r.volumeIDs()) > 0 || len(r.snapshotIDs()) > 0 {
		r.t.Errorf("left in the pool: %v, volumes %v, snapshots %v", entries, r.volumeIDs(), r.snapshotIDs())
	}
}

// fileSystemSize returns what statfs says of a mounted volume, in bytes.
func fileSystemSize(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(path, &st))
	return int64(st.Blocks) * st.Bsize
}

// writeTree writes files that differ from each other, and makes them durable.
func writeTree(t *testing.T, dir, salt string, files int) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	for i := range files {
		name := filepath.Join(dir, salt+"-"+strings.Repeat("x", i%7)+string(rune('a'+i%26))+strings.Repeat("0", i/26))
		must(t, os.WriteFile(name, slices.Repeat([]byte(salt+name), 1+i*11), 0o644))
	}
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	must(t, unix.Syncfs(int(f.Fd())))
}

// digest returns a checksum over the names and contents of a tree.
func digest(t *testing.T, dir string) string {
	t.Helper()
	return run(t, "bash", "-c", `cd "$1" && find . -type f -print0 | sort -z | xargs -0r sha256sum | sha256sum`, "digest", dir)
}

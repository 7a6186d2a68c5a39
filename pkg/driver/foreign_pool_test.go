package driver

import (
	"os"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// TestForeignPool: neither plugin nor engine touches the pool of another node, or a copy, until somebody says what it is.
func TestForeignPool(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string)
		settle func(dir, node string) error
		says   string
		kept   bool // the volume's ID
	}{
		"another node's": {
			func(t *testing.T, dir string) { t.Helper(); must(t, pool.Adopt(dir, "node-b")) }, pool.Adopt, `"node-b"`, true,
		},
		"a copy that is one of its own": {copyInPlace, pool.Renew, "pool init --new-uuid", false},
		"a copy that takes the place":   {copyInPlace, pool.Adopt, "pool adopt", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			ctx := t.Context()
			v := r.create("v", 8*mib, blockCapability(writer))
			snap := v.snapshot("snap")
			r.stop()
			r.engine.terminate()
			c.change(t, r.dir)
			r.startEngine()
			r.startPlugin(Options{})

			health := ok[*csi.NodeGetStorageHealthResponse](t)(r.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{}))
			if b := health.GetBackendHealth(); len(b) != 1 || b[0].GetReason() != "PoolNotReady" || !strings.Contains(b[0].GetMessage(), c.says) {
				t.Errorf("health: %v", health)
			}
			wantCode(t, codes.Unavailable)(r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}))
			wantCode(t, codes.Unavailable)(r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap}))
			wantCode(t, codes.Unavailable)(r.ListVolumes(ctx, &csi.ListVolumesRequest{}))
			wantCode(t, codes.Unavailable)(r.NodeStageVolume(ctx, v.stageRequest()))
			wantCode(t, codes.Unavailable)(r.GetCapacity(ctx, &csi.GetCapacityRequest{}))
			if _, err := r.client.Attach(ctx, v.id); codeOf(err) != codes.Unavailable {
				t.Errorf("the engine attaches: %v", err)
			}

			must(t, c.settle(r.dir, testNode))
			eventually(t, "all is well", func() bool { return r.storageReason() == "" })
			p, err := pool.Open(r.dir)
			must(t, err)
			if p.Owns(v.id) != c.kept {
				t.Errorf("volume %s in pool %s", v.id, p.UUID())
			}
			list := ok[*csi.ListVolumesResponse](t)(r.ListVolumes(ctx, &csi.ListVolumesRequest{}))
			if len(list.GetEntries()) != 1 {
				t.Fatalf("volumes: %v", list)
			}
			v.id = list.GetEntries()[0].GetVolume().GetVolumeId()
			v.publish("pod")
			v.unstage("pod")
			r.deleteSnapshots(snapshotID(v.id, "snap"))
			v.delete()
			r.wantEmpty()
		})
	}
}

// copyInPlace replaces a pool by a copy of itself.
func copyInPlace(t *testing.T, dir string) {
	t.Helper()
	run(t, "cp", "-a", dir, dir+".copy")
	must(t, os.RemoveAll(dir))
	must(t, os.Rename(dir+".copy", dir))
}

// An engine that knows its node's name needs no plugin to refuse a pool.
func TestEngineRefusesAnotherNodesPool(t *testing.T) {
	r := newIdleRig(t)
	must(t, pool.InitOn(r.dir, "node-b"))
	r.engine = startProcess(t, "engine", "--listen", r.endpoint("engine.sock"), "--pool", r.dir, "--node-id", testNode)
	client, err := engine.NewClient(r.endpoint("engine.sock"))
	must(t, err)
	defer client.Close()
	answer := ""
	eventually(t, "the engine answers", func() bool {
		_, err := client.Probe(t.Context())
		if err != nil {
			answer = err.Error()
		}
		return strings.Contains(answer, `of node "node-b"`)
	})
	must(t, pool.Adopt(r.dir, testNode))
	eventually(t, "the engine is ready", func() bool {
		_, err := client.Probe(t.Context())
		return err == nil
	})
}

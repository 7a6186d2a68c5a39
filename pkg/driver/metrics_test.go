package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
)

func TestMetrics(t *testing.T) {
	r := newIdleRig(t)
	initPool(t, r.dir)
	r.startEngine()
	registry := prometheus.NewPedanticRegistry()
	r.startPlugin(Options{Metrics: registry})
	req := r.createRequest("v", 8*mib, blockCapability(writer))
	req.Parameters = map[string]string{
		"csi.storage.k8s.io/pvc/namespace": "shop", "csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pv/name": "pvc-17",
	}
	v := r.createFrom(req)
	v.expand(v.publish("vm"), 16*mib)
	v.unstage("vm")
	kept := r.create("kept", 8*mib, blockCapability(writer))
	kept.snapshot("s")
	kept.delete()
	wantCode(t, codes.NotFound)(r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: "/none"}))

	families, err := registry.Gather()
	must(t, err)
	got := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			key := family.GetName()
			for _, l := range m.GetLabel() { // sorted by name: code, method; claim, namespace, …
				key += " " + l.GetValue()
			}
			got[key] = m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for key, want := range map[string]float64{
		"csi_qcow2_call_duration_seconds OK CreateVolume":             2,
		"csi_qcow2_call_duration_seconds NotFound NodeGetVolumeStats": 1,

		"csi_qcow2_pool_ready":      1,
		"csi_qcow2_pool_volumes":    1,
		"csi_qcow2_pool_tombstones": 1,

		"csi_qcow2_volume_info data shop pvc-17 " + v.id: 1,
		"csi_qcow2_pool_volume_bytes size " + v.id:       16 * mib,
		"csi_qcow2_pool_volume_bytes size " + kept.id:    8 * mib,
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
	if free, promised := got["csi_qcow2_pool_bytes free"], got["csi_qcow2_pool_bytes promised"]; free < mib || promised < 15*mib || promised > 16*mib {
		t.Errorf("free: %v, promised: %v", free, promised)
	}
	problems, err := testutil.GatherAndLint(registry)
	must(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	v.delete()
	r.deleteSnapshots(snapshotID(kept.id, "s"))
}

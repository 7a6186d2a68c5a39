package engine

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// What Prometheus reads is what the device's users did.
func TestMetrics(t *testing.T) {
	r := newRig(t)
	registry := prometheus.NewPedanticRegistry()
	r.inProcessWith(Options{Metrics: registry})
	m := r.mountedFS("ext4")
	_, err := r.client.CreateSnapshot(testContext(t), m.volume, "s", m.handle)
	must(t, err)
	must(t, r.client.DeleteSnapshot(testContext(t), m.volume, "s"))
	phases := gather(t, registry)
	for _, phase := range []qcow2.Phase{qcow2.PhaseDrain, qcow2.PhaseCut, qcow2.PhaseBuild, qcow2.PhaseSwitch, qcow2.PhasePunch} {
		if got := phases["csi_qcow2_volume_phase_seconds "+m.volume+" "+string(phase)]; got != 2 {
			t.Errorf("phase %s was seen %v times in two operations", phase, got)
		}
	}
	m.unmount(t)

	id := r.newVolume("raw", 8*mib)
	device := r.attach(id)
	before := gather(t, registry)
	fillDevice(t, device, 0, mib, 1)
	wantDevice(t, device, 0, mib, 1)
	after := gather(t, registry)
	for key, least := range map[string]float64{
		"csi_qcow2_volume_bytes_total " + id + " write":            mib,
		"csi_qcow2_volume_bytes_total " + id + " read":             mib,
		"csi_qcow2_volume_operations_total " + id + " flush":       1,
		"csi_qcow2_volume_operation_seconds_total " + id + " read": 1e-9,
	} {
		if got := after[key] - before[key]; got < least {
			t.Errorf("%s grew by %v, want %v", key, got, least)
		}
	}
	for key, want := range map[string]float64{
		"csi_qcow2_volume_failed " + id:                  0,
		"csi_qcow2_volume_size_bytes " + id:              8 * mib,
		"csi_qcow2_volume_errors_total " + id + " write": 0,
		"csi_qcow2_snapshot_duration_seconds create ok":  1,
		"csi_qcow2_snapshot_duration_seconds delete ok":  1,
		"csi_qcow2_freeze_duration_seconds":              1,
	} {
		if got, ok := after[key]; !ok || got != want {
			t.Errorf("%s is %v (%t), want %v", key, got, ok, want)
		}
	}
	problems, err := testutil.GatherAndLint(registry)
	must(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// Users of a volume whose worker is replaced wait; users of one that has failed get errors.
func TestMetricsOfTrouble(t *testing.T) {
	for state, want := range map[api.State][2]float64{
		api.State_SERVED: {0, 0}, api.State_FAILED: {1, 0}, api.State_REPLACING: {0, 1}, api.State_STALLED: {0, 1},
	} {
		registry := prometheus.NewPedanticRegistry()
		must(t, registry.Register(collected{&api.Attachment{VolumeId: "v", State: state}}))
		got := gather(t, registry)
		if got["csi_qcow2_volume_failed v"] != want[0] || got["csi_qcow2_volume_waiting v"] != want[1] || len(got) != 2 {
			t.Errorf("%v: %v", state, got)
		}
	}
}

// collected is one volume's metrics.
type collected struct{ a *api.Attachment }

func (c collected) Describe(chan<- *prometheus.Desc)     {}
func (c collected) Collect(out chan<- prometheus.Metric) { collectVolume(out, c.a) }

// gather returns the value, or the number of observations, of each metric, by its name and the values of its labels.
func gather(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	must(t, err)
	values := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			key := family.GetName()
			label := map[string]string{}
			for _, l := range m.GetLabel() {
				label[l.GetName()] = l.GetValue()
			}
			for _, name := range []string{"volume", "operation", "phase", "result"} {
				if v, ok := label[name]; ok {
					key += " " + v
				}
			}
			values[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

package engine

import (
	"context"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
)

// scrapePatience is how long the workers may take to say what they have counted.
const scrapePatience = 5 * time.Second

// metrics is what the engine tells Prometheus, besides the volumes' own.
type metrics struct {
	snapshots *prometheus.HistogramVec
	frozen    prometheus.Histogram
	deaths    *prometheus.CounterVec
}

func newMetrics() *metrics {
	return &metrics{
		snapshots: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "csi_qcow2_snapshot_duration_seconds",
			Help:    "How long snapshots of attached volumes took until they were whole, or gone; I/O goes on meanwhile.",
			Buckets: prometheus.ExponentialBuckets(0.005, 3, 9), // 5 ms to half a minute
		}, []string{"operation", "result"}),
		frozen: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "csi_qcow2_freeze_duration_seconds",
			Help:    "How long file systems were frozen for the instant of a snapshot.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 9), // 1 ms to 7 s
		}),
		deaths: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_qcow2_worker_deaths_total",
			Help: "Workers that died while they served a volume, and were replaced: its pods waited.",
		}, []string{"volume"}),
	}
}

// snapshot notes an operation on snapshots that has ended.
func (m *metrics) snapshot(operation string, start time.Time, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.snapshots.WithLabelValues(operation, result).Observe(time.Since(start).Seconds())
}

// register adds the engine's metrics to a registry. Requests to the workers end with ctx.
func (s *service) register(ctx context.Context, r prometheus.Registerer) error {
	for _, c := range []prometheus.Collector{s.metrics.snapshots, s.metrics.frozen, s.metrics.deaths, volumeCollector{s, ctx}} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// volumeCollector asks the workers when it is asked.
type volumeCollector struct {
	service *service
	ctx     context.Context //nolint:containedctx // Collect has none
}

func volumeMetric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("csi_qcow2_volume_"+name, help, append([]string{"volume"}, labels...), nil)
}

// Describe leaves out what there is: it depends on the volumes.
func (c volumeCollector) Describe(chan<- *prometheus.Desc) {}

func (c volumeCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(c.ctx, scrapePatience)
	defer cancel()
	list, err := c.service.List(ctx, &api.ListRequest{})
	if err != nil {
		klog.V(2).InfoS("No metrics of volumes", "reason", err)
		return
	}
	for _, a := range list.GetAttachments() {
		collectVolume(out, a)
	}
}

func collectVolume(out chan<- prometheus.Metric, a *api.Attachment) {
	id := a.GetVolumeId()
	send := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, kind, value, append([]string{id}, labels...)...)
	}
	is := func(states ...api.State) float64 {
		if slices.Contains(states, a.GetState()) {
			return 1
		}
		return 0
	}
	send(volumeMetric("failed", "1 if an attached volume is not served any more: its pods get I/O errors."),
		prometheus.GaugeValue, is(api.State_FAILED))
	send(volumeMetric("waiting", "1 if the pods of an attached volume wait: for another worker, or for one or a disk that does not answer."),
		prometheus.GaugeValue, is(api.State_REPLACING, api.State_STALLED))
	if len(a.GetOperations()) == 0 { // there is no worker to tell
		return
	}
	size := volumeMetric("size_bytes", "Virtual size of an attached volume.")
	count := volumeMetric("operations_total", "Requests to a volume's device.", "operation")
	errors := volumeMetric("errors_total", "Requests to a volume's device that failed.", "operation")
	bytes := volumeMetric("bytes_total", "Bytes of the requests to a volume's device.", "operation")
	seconds := volumeMetric("operation_seconds_total", "Time that the requests to a volume's device took, added up.", "operation")
	send(size, prometheus.GaugeValue, float64(a.GetSize()))
	for _, o := range a.GetOperations() {
		send(count, prometheus.CounterValue, float64(o.GetCount()), o.GetKind())
		send(errors, prometheus.CounterValue, float64(o.GetErrors()), o.GetKind())
		send(bytes, prometheus.CounterValue, float64(o.GetBytes()), o.GetKind())
		send(seconds, prometheus.CounterValue, time.Duration(o.GetNanoseconds()).Seconds(), o.GetKind())
	}
	phases := volumeMetric("phase_seconds", "How long the phases of operations on a volume's snapshots and size took.", "phase")
	for _, p := range a.GetPhases() {
		buckets := make(map[float64]uint64)
		for _, b := range p.GetBuckets() {
			buckets[b.GetSeconds()] = uint64(b.GetCount())
		}
		sum := time.Duration(p.GetNanoseconds()).Seconds()
		out <- prometheus.MustNewConstHistogram(phases, uint64(p.GetCount()), sum, buckets, id, p.GetName())
	}
}

package driver

import (
	"context"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// metrics is what the plugin tells Prometheus.
type metrics struct {
	calls *prometheus.HistogramVec
}

func newMetrics() *metrics {
	return &metrics{calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "csi_qcow2_call_duration_seconds",
		Help:    "Duration of the calls of the CSI services.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 9), // 1 ms to a minute
	}, []string{"method", "code"})}
}

// measureCalls is outside of all that handles errors: it sees the code that is sent.
func (m *metrics) measureCalls(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handle(ctx, req)
	m.calls.WithLabelValues(path.Base(info.FullMethod), status.Code(err).String()).Observe(time.Since(start).Seconds())
	return resp, err
}

// register adds the plugin's metrics to a registry.
func (d *Driver) register(r prometheus.Registerer) error {
	if err := r.Register(d.metrics.calls); err != nil {
		return err
	}
	return r.Register(poolCollector{d})
}

// poolCollector looks at the pool when it is asked.
type poolCollector struct{ *Driver }

func poolMetric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("csi_qcow2_pool_"+name, help, labels, nil)
}

// Describe leaves out what there is: a pool that is not ready has only one metric.
func (c poolCollector) Describe(chan<- *prometheus.Desc) {}

func (c poolCollector) Collect(out chan<- prometheus.Metric) {
	send := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	ready := poolMetric("ready", "1 if the node's pool can be used.")
	p, err := c.pool()
	if err != nil {
		send(ready, 0)
		return
	}
	send(ready, 1)
	if space, err := p.Space(nil); err == nil {
		bytes := poolMetric("bytes", "Space of the pool's file system, and what volumes occupy and are promised of it.", "kind")
		send(bytes, float64(space.Total), "total")
		send(bytes, float64(space.Free), "free")
		send(bytes, float64(space.Used), "used")
		send(bytes, float64(space.Promised), "promised")
	}
	if left, err := c.capacity.available(p); err == nil {
		send(poolMetric("available_bytes", "What can be promised to new volumes."), float64(left))
	}
	volumes, err := p.Volumes()
	if err != nil {
		klog.Background().Error(err, "Volumes are left out of the metrics")
	}
	info := prometheus.NewDesc("csi_qcow2_volume_info", "The claim that a volume was made for, and its PersistentVolume.",
		[]string{"volume", "namespace", "claim", "persistent_volume"}, nil)
	size := poolMetric("volume_bytes", "Size of a volume, and what it occupies with its snapshots.", "volume", "kind")
	live, tombstones := 0, 0
	for _, v := range volumes {
		send(info, 1, v.ID, v.Claim.Namespace, v.Claim.Name, v.Claim.PersistentVolume)
		if used, now, err := p.Usage(v.ID); err == nil {
			send(size, float64(max(now, v.LeastSize())), v.ID, "size")
			send(size, float64(used), v.ID, "used")
		}
		if v.Tombstone {
			tombstones++
		} else {
			live++
		}
	}
	send(poolMetric("volumes", "Volumes in the pool."), float64(live))
	send(poolMetric("tombstones", "Deleted volumes that only keep their snapshots."), float64(tombstones))
}

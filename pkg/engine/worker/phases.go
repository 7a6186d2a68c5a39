package worker

import (
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// phaseLogLevel is the verbosity at which each phase of an operation is logged.
const phaseLogLevel = 4

// phaseTimes counts how long the phases of operations on snapshots and the size took.
type phaseTimes struct {
	mu  sync.Mutex // guards all
	all []*api.Phase
}

// phaseBounds are the upper ends of the histograms' buckets: from what nobody notices to what a pod's health check does.
func phaseBounds() []time.Duration {
	return []time.Duration{time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond, time.Second, 10 * time.Second}
}

// note is qcow2.OpenOptions.Trace.
func (t *phaseTimes) note(name qcow2.Phase, took time.Duration) {
	klog.V(phaseLogLevel).InfoS("Phase", "name", name, "duration", took)
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.phase(string(name))
	p.Count++
	p.Nanoseconds += int64(took)
	for i, bound := range phaseBounds() {
		if took <= bound {
			p.Buckets[i].Count++
		}
	}
}

// phase is called with mu held.
func (t *phaseTimes) phase(name string) *api.Phase {
	for _, p := range t.all {
		if p.GetName() == name {
			return p
		}
	}
	p := &api.Phase{Name: name}
	for _, bound := range phaseBounds() {
		p.Buckets = append(p.Buckets, &api.Bucket{Seconds: bound.Seconds()})
	}
	t.all = append(t.all, p)
	return p
}

// report returns what has been counted.
func (t *phaseTimes) report() []*api.Phase {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*api.Phase, 0, len(t.all))
	for _, p := range t.all {
		all = append(all, proto.CloneOf(p))
	}
	return all
}

package cluster

import (
	"context"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

// healthPeriod is how often the volumes in use are looked at.
const healthPeriod = 10 * time.Second

// Volume is one that is in use on this node.
type Volume struct {
	Name, Handle string // of its PersistentVolume
	Deaths       int    // of what serves it, as counted by an engine; less than before: by another one
	// Reason and Message say what is wrong; empty: nothing.
	Reason, Message string
}

// health makes Events of what goes wrong with the volumes in use.
type health struct {
	Options
	events record.EventRecorder
	before map[string]Volume // by handle, what has been said
}

// run works until ctx ends.
func (h *health) run(ctx context.Context) {
	tick := time.NewTicker(healthPeriod)
	defer tick.Stop()
	for {
		if err := h.look(ctx); err != nil {
			klog.FromContext(ctx).V(2).Info("The health of volumes is not known", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look tells what has changed since the last time. What could not be told is told the next time.
func (h *health) look(ctx context.Context) error {
	volumes, err := h.Attached(ctx)
	if err != nil {
		return err
	}
	now := map[string]Volume{}
	for _, v := range volumes {
		before, known := h.before[v.Handle]
		now[v.Handle] = v
		if !known {
			before = Volume{Deaths: v.Deaths}
		}
		if err := h.tell(ctx, before, v); err != nil {
			klog.FromContext(ctx).V(2).Info("No Event", "volume", v.Handle, "err", err)
			now[v.Handle] = before
		}
	}
	h.before = now
	return nil
}

// tell makes the Events of one volume.
func (h *health) tell(ctx context.Context, before, now Volume) error {
	died := now.Deaths > before.Deaths && now.Reason == ""
	if !died && now.Reason == before.Reason {
		return nil
	}
	volume, err := h.Core.PersistentVolumes().Get(ctx, now.Name, meta.GetOptions{})
	if err != nil {
		return err
	}
	claim := volume.Spec.ClaimRef
	if claim == nil || volume.Spec.CSI == nil || volume.Spec.CSI.Driver != h.Driver || volume.Spec.CSI.VolumeHandle != now.Handle {
		return nil // another volume of that name
	}
	switch {
	case now.Reason != "":
		h.events.Eventf(claim, core.EventTypeWarning, now.Reason, "On node %s: %s", h.Node, now.Message)
	case before.Reason != "":
		h.events.Eventf(claim, core.EventTypeNormal, "VolumeRecovered", "On node %s: the volume is served again", h.Node)
	default:
		h.events.Eventf(claim, core.EventTypeWarning, "WorkerReplaced",
			"On node %s: what serves the volume died, and was replaced; its users waited meanwhile", h.Node)
	}
	return nil
}

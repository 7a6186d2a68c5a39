package worker

import (
	"time"

	"k8s.io/klog/v2"
)

// reclaimLeaks gives back what an unclean stop has left counted and unused, beside the users of the volume. If it does not
// come to its end, the volume stays marked, and the next attach tries again.
func (s *served) reclaimLeaks() {
	volume, start := s.lease.Volume().ID, time.Now()
	r, err := s.img.ReclaimLeaks(s.tasksCtx)
	figures := []any{
		"volume", volume, "clusters", r.Clusters, "bytes", r.Clusters * s.img.ClusterSize(), "lowered", r.Lowered,
		"duration", time.Since(start),
	}
	switch {
	case s.tasksCtx.Err() != nil:
		klog.InfoS("Search for leaks was interrupted; the next attach goes on", figures...)
	case err != nil:
		klog.ErrorS(err, "Leaks of an unclean stop stay", figures...)
	case !r.Complete:
		klog.InfoS("Reclaimed leaks of an unclean stop; the next attach looks for more", figures...)
	default:
		klog.InfoS("Reclaimed leaks of an unclean stop", figures...)
		s.leaky.Store(false)
	}
}

// markClean notes that the image was closed properly. Without the note leaks are looked for in vain, no more.
func (s *served) markClean() {
	if err := s.lease.ClearAttached(); err != nil {
		klog.ErrorS(err, "Volume was detached cleanly, but is not marked so", "volume", s.lease.Volume().ID)
	}
}

package engine

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A worker that dies is replaced: the holder has the device, the kernel the requests, the redo log what was acknowledged.
// The users of the volume wait meanwhile.
const (
	// defaultIOTimeout is how long they wait at most.
	defaultIOTimeout = time.Minute
	// A worker that cannot start is tried again after a pause that doubles.
	minRespawnPause = 20 * time.Millisecond
	maxRespawnPause = 5 * time.Second
	// restartPeriod is the least time from one start to the next of a worker that starts and dies.
	restartPeriod = 250 * time.Millisecond
)

// lost replaces a worker that has died while its volume was attached.
func (s *supervisor) lost(id string, a *attachment) {
	s.mu.Lock()
	reason := a.worker.death()
	if s.attached[id] != a || s.closing {
		s.mu.Unlock()
		return
	}
	orphan := &attachment{device: a.device, failure: reason.Error(), waiting: true, deaths: a.deaths + 1}
	s.attached[id] = orphan
	s.mu.Unlock()
	klog.ErrorS(reason, "Worker died, starting another: the volume's users wait", "volume", id, "device", a.device)
	s.metrics.deaths.WithLabelValues(id).Inc()
	s.respawn(id, orphan, a.started.Add(restartPeriod))
}

// respawn starts a worker for a volume that waits for one, at a time that may have passed. It gives up after the I/O
// time-out.
func (s *supervisor) respawn(id string, a *attachment, at time.Time) {
	since := time.Now()
	ctx, cancel := context.WithTimeout(s.running, s.options.IOTimeout)
	defer cancel()
	var err error
	for pause := minRespawnPause; sleepUntil(ctx, at); pause = min(2*pause, maxRespawnPause) {
		var done bool
		if done, err = s.tryRespawn(ctx, id, a); done {
			return
		}
		klog.ErrorS(err, "Worker does not start: the volume's users wait", "volume", id, "device", a.device, "since", since)
		at = time.Now().Add(pause)
	}
	if s.running.Err() == nil {
		s.giveUp(id, a, fmt.Errorf("nothing has served it for %.0f s: %w", s.options.IOTimeout.Seconds(), cmp.Or(err, ctx.Err())))
	}
}

// tryRespawn starts a worker once; done, if there is nothing more to do.
func (s *supervisor) tryRespawn(ctx context.Context, id string, a *attachment) (done bool, err error) {
	unlock, err := s.workers.lock(ctx, id)
	if err != nil {
		return false, err
	}
	defer unlock()
	if s.find(id) != a {
		return true, nil
	}
	start := time.Now()
	if _, err := s.start(ctx, s.openedPool(), id); err != nil {
		return s.running.Err() != nil, err
	}
	klog.InfoS("Another worker serves the volume", "volume", id, "device", a.device, "duration", time.Since(start))
	return true, nil
}

// giveUp ends the device of a volume that waits for a worker: its users get errors.
func (s *supervisor) giveUp(id string, a *attachment, reason error) {
	unlock, err := s.workers.lock(s.running, id)
	if err != nil {
		return
	}
	defer unlock()
	if s.find(id) != a {
		return
	}
	klog.ErrorS(reason, "Volume failed: its users get I/O errors", "volume", id, "device", a.device)
	if err := worker.Discard(s.running, s.holder, id); err != nil {
		klog.ErrorS(err, "Device of a failed volume stays", "volume", id, "device", a.device)
	}
	s.set(id, &attachment{device: a.device, failure: reason.Error(), deaths: a.deaths})
}

// resume goes on with the volumes that an earlier engine has left, and with the devices that it has.
func (s *supervisor) resume(waiting map[string]*attachment) {
	for id, a := range waiting {
		s.tasks.Go(func() { s.respawn(id, a, time.Now()) })
	}
	s.tasks.Go(func() { s.dropStandbys(func(id string) bool { return waiting[id] != nil }) })
}

// held returns the volumes of p whose device is kept.
func (s *supervisor) held(ctx context.Context, p *pool.Pool) (map[string]bool, error) {
	if s.ownHolder && s.openedPool() == nil {
		return nil, nil // it does not run yet, and has nothing
	}
	ctx, cancel := context.WithTimeout(ctx, worker.HolderPatience)
	defer cancel()
	names, err := s.holder.List(ctx)
	held := map[string]bool{}
	for _, id := range names {
		if p.Owns(id) {
			held[id] = true
		}
	}
	return held, err
}

// sleepUntil tells whether ctx still runs at that time.
func sleepUntil(ctx context.Context, at time.Time) bool {
	t := time.NewTimer(time.Until(at))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

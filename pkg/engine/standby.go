package engine

import (
	"context"
	"fmt"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// startStandbys has a worker process wait for each volume that the running engine serves: the users of the volumes, who wait when
// that engine ends, do not wait for processes to start.
func (s *supervisor) startStandbys(ctx context.Context, p *pool.Pool, volumes map[string]bool) {
	var starting sync.WaitGroup
	for id := range volumes {
		w, err := s.startWorker(p, id)
		if err != nil {
			klog.ErrorS(err, "Worker cannot be started beforehand", "volume", id)
			continue
		}
		s.mu.Lock()
		s.standbys[id] = w
		s.mu.Unlock()
		starting.Go(func() {
			if err := w.ready(ctx); err != nil {
				klog.ErrorS(err, "Worker that was started beforehand is not ready", "volume", id)
			}
		})
	}
	starting.Wait()
}

// ready waits until a worker that serves nothing yet answers.
func (p *process) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	if _, err := p.api.List(ctx, &api.ListRequest{}); err != nil {
		return fmt.Errorf("the worker of %s does not answer: %w", p.volume, err)
	}
	return nil
}

// takeStandby returns the worker that waits for a volume, nil if none does.
func (s *supervisor) takeStandby(id string) *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.standbys[id]
	delete(s.standbys, id)
	if w != nil && w.death() != nil {
		return nil
	}
	return w
}

// dropStandbys ends the workers that wait for a volume for which want does not ask.
func (s *supervisor) dropStandbys(want func(id string) bool) {
	s.mu.Lock()
	var all []string
	for id := range s.standbys {
		all = append(all, id)
	}
	s.mu.Unlock()
	var ending sync.WaitGroup
	for _, id := range all {
		if !want(id) {
			if w := s.takeStandby(id); w != nil {
				ending.Go(func() { w.stopWithin(leavePatience) })
			}
		}
	}
	ending.Wait()
}

package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// maxUncollected bounds the clones whose success nobody has asked for.
const maxUncollected = 256

// cloneCall is one Clone, which may have several callers, at once or one after the other.
type cloneCall struct {
	request *api.CloneRequest
	done    chan struct{} // closed when it has ended
	err     error         // read after done
}

// Clone joins the running clone to the same target, if there is one. One that succeeded after its callers
// had left is remembered until somebody has asked for it again.
func (s *service) Clone(ctx context.Context, r *api.CloneRequest) (*api.CloneResponse, error) {
	c, err := s.joinClone(ctx, r)
	if err != nil {
		return nil, err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("the copy goes on: %w", ctx.Err())
	}
	s.forgetClone(c)
	if c.err != nil {
		return nil, c.err
	}
	return &api.CloneResponse{}, nil
}

func (s *service) joinClone(ctx context.Context, r *api.CloneRequest) (*cloneCall, error) {
	p, err := s.ready(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkTarget(p, r.GetTarget()); err != nil {
		return nil, err
	}
	if c := s.cloneTo(r.GetTarget()); c != nil && !c.vanished() {
		return c.matching(r)
	}
	w, _, err := s.worker(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, errClosing
	}
	if c := s.clones[r.GetTarget()]; c != nil && !c.ended() {
		return c.matching(r)
	}
	c := &cloneCall{request: r, done: make(chan struct{})}
	s.forgetEnded()
	s.clones[r.GetTarget()] = c
	s.tasks.Go(func() {
		ctx, cancel := s.outlive(ctx)
		defer cancel()
		s.runClone(ctx, w, c)
	})
	return c, nil
}

func (s *service) runClone(ctx context.Context, w *process, c *cloneCall) {
	defer close(c.done)
	_, err := w.api.Clone(ctx, c.request)
	c.err = w.explain(err)
	if errors.Is(c.err, ErrUnavailable) {
		_ = os.Remove(c.request.GetTarget() + worker.PartSuffix) // of a worker that died
	}
	if c.err != nil {
		s.forgetClone(c) // who comes later starts it again
	}
}

func (s *service) forgetClone(c *cloneCall) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clones[c.request.GetTarget()] == c {
		delete(s.clones, c.request.GetTarget())
	}
}

func (s *service) cloneTo(target string) *cloneCall {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.clones[target]
}

// matching returns the clone if it is the one that is asked for.
func (c *cloneCall) matching(r *api.CloneRequest) (*cloneCall, error) {
	if !proto.Equal(c.request, r) {
		return nil, fmt.Errorf("%w: another clone to %s is running", ErrInvalid, r.GetTarget())
	}
	return c, nil
}

// ended tells whether the clone runs no more.
func (c *cloneCall) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// vanished tells whether the clone was made, and its target removed since.
func (c *cloneCall) vanished() bool {
	if !c.ended() {
		return false
	}
	_, err := os.Lstat(c.request.GetTarget())
	return errors.Is(err, os.ErrNotExist)
}

// forgetEnded forgets clones that nobody asked for again, if there are too many. mu is held.
func (s *service) forgetEnded() {
	if len(s.clones) >= maxUncollected {
		maps.DeleteFunc(s.clones, func(_ string, c *cloneCall) bool { return c.ended() })
	}
}

// checkTarget makes sure that a clone is written inside the pool, whatever links its path has.
func checkTarget(p *pool.Pool, target string) error {
	if !filepath.IsAbs(target) || filepath.Clean(target) != target {
		return fmt.Errorf("%w: target %q is not a clean absolute path", ErrInvalid, target)
	}
	root, err := filepath.EvalSymlinks(p.Dir())
	if err != nil {
		return fmt.Errorf("%w: %w", pool.ErrNotReady, err)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(target))
	if err != nil {
		return fmt.Errorf("%w: target: %w", ErrInvalid, err)
	}
	if dir != root && !strings.HasPrefix(dir, root+"/") {
		return fmt.Errorf("%w: target %q is not in the pool", ErrInvalid, target)
	}
	return nil
}

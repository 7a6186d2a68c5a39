package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// maxUncollected bounds the finished clones whose result nobody has asked for.
const maxUncollected = 256

// cloneCall is one Clone, which may have several callers, at once or one after the other.
type cloneCall struct {
	request *api.CloneRequest
	done    chan struct{} // closed when it has ended
	err     error         // read after done
}

// Clone joins the running clone to the same target, if there is one. One that ended after its callers had
// left is remembered until somebody has seen how.
func (s *service) Clone(ctx context.Context, r *api.CloneRequest) (*api.CloneResponse, error) {
	c, err := s.joinClone(ctx, r)
	if err != nil {
		return nil, err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("the clone to %s goes on: %w", r.GetTarget(), ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clones[r.GetTarget()] == c {
		delete(s.clones, r.GetTarget())
	}
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
	if c := s.cloneTo(r.GetTarget()); c != nil {
		return c.matching(r)
	}
	w, _, err := s.worker(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.clones[r.GetTarget()]; c != nil {
		return c.matching(r)
	}
	c := &cloneCall{request: r, done: make(chan struct{})}
	s.forgetClones()
	s.clones[r.GetTarget()] = c
	s.tasks.Go(func() {
		defer close(c.done)
		_, err := w.api.Clone(context.WithoutCancel(ctx), r)
		if c.err = w.explain(err); errors.Is(c.err, ErrUnavailable) {
			_ = os.Remove(r.GetTarget() + partSuffix) // of a worker that died
		}
	})
	return c, nil
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

// forgetClones makes room if too many results were never collected. mu is held.
func (s *service) forgetClones() {
	if len(s.clones) < maxUncollected {
		return
	}
	for target, c := range s.clones {
		select {
		case <-c.done:
			delete(s.clones, target)
		default:
		}
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

package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// answerAfter is how long a CreateSnapshot waits, after the snapshot's instant, for the snapshot to be whole before
// it answers with a pending one. Whoever froze something for the instant waits for the answer.
const answerAfter = time.Second

// snapshotCall is one CreateSnapshot, which may have several callers, at once or one after the other. It holds the
// volume's lock until it has ended.
type snapshotCall struct {
	volume, name string
	cut          chan struct{} // closed when the instant has passed
	done         chan struct{} // closed when the call has ended

	future *api.Snapshot // what the snapshot will be; read after cut
	answer *api.Snapshot // read after done
	err    error         // read after done

	mu       sync.Mutex // guards what follows
	recorded bool       // in the pool, as pending
	ended    bool
}

// CreateSnapshot joins the running call of the same name, if there is one.
func (s *service) CreateSnapshot(ctx context.Context, r *api.CreateSnapshotRequest) (*api.CreateSnapshotResponse, error) {
	if err := checkSnapshotName(r.GetName()); err != nil {
		return nil, err
	}
	defer s.fds.drop(r.GetFreezeToken()) // unless the call has taken it
	c, err := s.joinSnapshot(ctx, r)
	if err != nil {
		return nil, err
	}
	cut := c.cut
	var early <-chan time.Time
	for {
		select {
		case <-c.done:
			return &api.CreateSnapshotResponse{Snapshot: c.answer}, c.err
		case <-cut:
			cut, early = nil, time.After(cmp.Or(s.options.hooks.answerAfter, answerAfter))
		case <-early:
			if pending := c.promise(s.openedPool()); pending != nil {
				return &api.CreateSnapshotResponse{Snapshot: pending}, nil
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("snapshot %q goes on: %w", r.GetName(), ctx.Err())
		}
	}
}

func (s *service) joinSnapshot(ctx context.Context, r *api.CreateSnapshotRequest) (*snapshotCall, error) {
	if _, _, err := s.worker(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, errClosing
	}
	for _, c := range s.snapshots {
		if c.volume == r.GetVolumeId() && c.name == r.GetName() {
			return c, nil
		}
	}
	c := &snapshotCall{
		volume: r.GetVolumeId(), name: r.GetName(), cut: make(chan struct{}), done: make(chan struct{}),
	}
	s.snapshots = append(s.snapshots, c)
	s.tasks.Go(func() {
		ctx, cancel := s.outlive(ctx)
		defer cancel()
		s.runSnapshot(ctx, c, r.GetFreezeToken())
	})
	return c, nil
}

// runSnapshot is the call itself.
func (s *service) runSnapshot(ctx context.Context, c *snapshotCall, freezeToken string) {
	defer func() {
		if fault := recover(); fault != nil {
			c.err = panicked("CreateSnapshot", fault)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.snapshots = slices.DeleteFunc(s.snapshots, func(other *snapshotCall) bool { return other == c })
		close(c.done)
	}()
	w, device, unlock, err := s.locked(ctx, c.volume)
	if err != nil {
		c.err = err
		return
	}
	defer unlock()
	start := time.Now()
	c.answer, err = s.createSnapshot(ctx, c, w, device, freezeToken)
	c.err = w.explain(err)
	s.metrics.snapshot("create", start, c.err)
	c.end(s.openedPool())
}

// createSnapshot returns the snapshot of the name if there is one: a repeated call must not freeze the file system
// again, and its token may be gone.
func (s *service) createSnapshot(
	ctx context.Context, c *snapshotCall, w *process, device, freezeToken string,
) (*api.Snapshot, error) {
	var h *helper.Helper
	var takeErr error
	if freezeToken != "" {
		if h, takeErr = s.fds.take(freezeToken); takeErr == nil {
			defer h.End()
		}
	}
	existing, err := w.snapshot(ctx, c.name)
	if err != nil || existing != nil {
		return existing, err
	}
	if err := CheckNotLost(s.openedPool(), c.volume, c.name); err != nil {
		return nil, err
	}
	switch {
	case takeErr != nil:
		return nil, takeErr
	case h == nil:
		return w.createSnapshot(ctx, c.name, c.announce)
	}
	return s.frozenSnapshot(ctx, c, w, device, h)
}

// CheckNotLost is ErrLost if a snapshot of this name was promised, and the volume's image has none: it was lost. Whoever
// calls it keeps the volume from being changed meanwhile.
func CheckNotLost(p *pool.Pool, volume, name string) error {
	all, err := p.PendingSnapshots(volume)
	for _, s := range all {
		if s.Name == name {
			return fmt.Errorf("%w: %q, of %s, was interrupted before it was whole: delete it and take another",
				ErrLost, name, s.Created.Format(time.RFC3339))
		}
	}
	return err
}

// announce notes that the instant has passed; future is nil if there was none.
func (c *snapshotCall) announce(future *api.Snapshot) {
	if future != nil {
		c.future = future
		close(c.cut)
	}
}

// promise records the snapshot as pending, durably, and returns it so. nil when that is not possible, or the call
// has just ended: its callers go on waiting.
func (c *snapshotCall) promise(p *pool.Pool) *api.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil
	}
	pending := &api.Snapshot{
		Id: c.future.GetId(), Name: c.name, CreationTime: c.future.GetCreationTime(), DiskSize: c.future.GetDiskSize(), Pending: true,
	}
	if c.recorded {
		return pending
	}
	err := p.AddPendingSnapshot(c.volume, pool.PendingSnapshot{Name: c.name, Created: c.future.GetCreationTime().AsTime()})
	if err != nil {
		klog.ErrorS(err, "A snapshot cannot be answered early", "volume", c.volume, "snapshot", c.name)
		return nil
	}
	c.recorded = true
	return pending
}

// end forgets the record of a snapshot that is whole now. That of a failed one stays: it has been promised.
func (c *snapshotCall) end(p *pool.Pool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if !c.recorded {
		return
	}
	if c.err != nil {
		klog.ErrorS(c.err, "A snapshot that was answered early is lost", "volume", c.volume, "snapshot", c.name)
		return
	}
	if err := p.EndPendingSnapshot(c.volume, c.name); err != nil {
		klog.ErrorS(err, "The record of a pending snapshot stays", "volume", c.volume, "snapshot", c.name)
	}
}

// pendingSnapshot returns the snapshot of a volume that has been answered early and is not whole yet, or nil.
func (s *service) pendingSnapshot(volume string) *api.Snapshot {
	s.mu.Lock()
	calls := slices.Clone(s.snapshots)
	s.mu.Unlock()
	for _, c := range calls {
		if c.volume != volume {
			continue
		}
		c.mu.Lock()
		recorded := c.recorded
		c.mu.Unlock()
		if recorded {
			return c.promise(s.openedPool())
		}
	}
	return nil
}

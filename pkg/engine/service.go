package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// service is the control API of a supervisor. What a call has begun goes on when its caller is gone, until
// the worker is: supervisor.outlive.
type service struct {
	api.UnimplementedEngineServer
	*supervisor
}

func (s *service) Probe(ctx context.Context, _ *api.ProbeRequest) (*api.ProbeResponse, error) {
	p, err := s.ready(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	lost := s.lostPool
	s.mu.Unlock()
	if err := cmp.Or(lost, p.Ready()); err != nil {
		return nil, err
	}
	return &api.ProbeResponse{Version: s.options.Version}, nil
}

func (s *service) Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachResponse, error) {
	id := r.GetVolumeId()
	unlock, err := s.lockVolume(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	p, err := s.ready(ctx)
	if err != nil {
		return nil, err
	}
	v, err := p.Volume(id)
	if err != nil {
		return nil, err
	}
	if v.Tombstone {
		return nil, fmt.Errorf("%s: %w", id, ErrTombstone)
	}
	a, err := s.reuse(ctx, id)
	if err != nil {
		return nil, err
	}
	if a != nil {
		return a.response(), nil
	}
	held, err := s.held(ctx, p)
	if err != nil {
		return nil, err
	}
	if before := s.devices.present(id, ""); before != "" && !held[id] { // it stays until the volume is detached
		s.thawDead(ctx, p, id, before)
	}
	ctx, cancel := s.outlive(ctx)
	defer cancel()
	a, err = s.start(ctx, p, id, r.GetAvoid()...)
	if err != nil {
		return nil, err
	}
	return a.response(), nil
}

// reuse returns the attachment of a volume that is attached and well, nil when it needs a new worker.
func (s *service) reuse(ctx context.Context, id string) (*attachment, error) {
	a := s.find(id)
	if a != nil && a.waiting {
		return nil, a.replacing()
	}
	if a == nil || a.worker == nil {
		return nil, nil //nolint:nilnil // see above
	}
	status, err := a.worker.status(ctx)
	err = a.worker.explain(err)
	switch {
	case a.worker.death() != nil:
		klog.ErrorS(err, "Replacing a dead worker", "volume", id)
	case err != nil:
		return nil, err
	case status.GetState() != api.State_FAILED:
		return a, nil
	default:
		klog.ErrorS(nil, "Replacing a failed worker", "volume", id, "failure", status.GetFailure())
	}
	s.set(id, nil)
	ctx, cancel := s.outlive(ctx)
	defer cancel()
	err = worker.Discard(ctx, s.holder, id)
	a.worker.stop()
	return nil, err
}

func (s *service) Detach(ctx context.Context, r *api.DetachRequest) (*api.DetachResponse, error) {
	id := r.GetVolumeId()
	p, err := s.ready(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := pool.ParseID(id); err != nil {
		return nil, err
	}
	unlock, err := s.lockVolume(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx, cancel := s.outlive(ctx)
	defer cancel()
	a := s.find(id)
	if a != nil && a.worker != nil {
		if err := s.detachServed(ctx, id, a); err != nil {
			return nil, err
		}
	}
	if a != nil && a.waiting {
		return nil, a.replacing()
	}
	if a != nil && a.worker == nil {
		if err := s.clearDevices(ctx, p, id); err != nil {
			return nil, err
		}
		s.set(id, nil)
	}
	s.ended(ctx, p, id)
	return &api.DetachResponse{}, nil
}

// detachServed detaches a volume that has a worker. A file system that is frozen keeps its device busy after it was unmounted
// everywhere, whoever has frozen it, and nobody is left to thaw it: then that is done here.
func (s *service) detachServed(ctx context.Context, id string, a *attachment) error {
	detach := func() error {
		_, err := a.worker.api.Detach(ctx, &api.DetachRequest{VolumeId: id})
		return err
	}
	err := detach()
	if errors.Is(err, ErrInUse) && s.thawUnmounted(ctx, id, a.device) {
		err = detach()
	}
	switch {
	case errors.Is(err, ErrInUse):
		return err
	case s.running.Err() != nil: // the next engine has it
		return errors.Join(errClosing, err)
	}
	s.set(id, nil)
	if err != nil {
		err = errors.Join(err, worker.Discard(ctx, s.holder, id))
	}
	a.worker.stop()
	if err != nil {
		err = a.worker.explain(err)
		s.set(id, &attachment{device: a.device, failure: err.Error()})
	}
	return err
}

func (s *service) List(ctx context.Context, r *api.ListRequest) (*api.ListResponse, error) {
	if _, err := s.ready(ctx); err != nil {
		return nil, err
	}
	if id := r.GetVolumeId(); id != "" {
		a := s.find(id)
		if a == nil {
			return &api.ListResponse{}, nil
		}
		return &api.ListResponse{Attachments: []*api.Attachment{a.describe(ctx, id, (*process).status)}}, nil
	}
	return s.listAll(ctx)
}

// listAll does not wait for long for a worker that does not answer.
func (s *service) listAll(ctx context.Context) (*api.ListResponse, error) {
	attached := s.attachments()
	ids := slices.Sorted(maps.Keys(attached))
	r := &api.ListResponse{Attachments: make([]*api.Attachment, len(ids))}
	var questions sync.WaitGroup
	for i, id := range ids {
		questions.Go(func() { r.Attachments[i] = attached[id].describe(ctx, id, (*process).lastStatus) })
	}
	questions.Wait()
	return r, nil
}

// describe says how a volume is served; ask is how its worker is asked.
func (a *attachment) describe(
	ctx context.Context, id string, ask func(*process, context.Context) (*api.Attachment, error),
) *api.Attachment {
	r := &api.Attachment{VolumeId: id, Device: a.device, Failure: a.failure}
	switch {
	case a.worker != nil:
		r = a.worker.describe(ctx, r, ask)
	case a.waiting:
		r.State = api.State_REPLACING
	default:
		r.State = api.State_FAILED
	}
	r.Deaths = int32(a.deaths)
	return r
}

// describe returns what a worker says of itself; of one that does not, what it last said, or what else is known.
func (p *process) describe(
	ctx context.Context, known *api.Attachment, ask func(*process, context.Context) (*api.Attachment, error),
) *api.Attachment {
	status, err := ask(p, ctx)
	if err == nil {
		return proto.CloneOf(status)
	}
	if last := p.said(); last != nil {
		known = proto.CloneOf(last)
	}
	known.Silent = true
	if !errors.Is(err, context.DeadlineExceeded) { // else there is nothing to wait for
		err = p.explain(err)
	}
	known.State, known.Failure = api.State_STALLED, err.Error()
	if p.death() != nil {
		known.State = api.State_REPLACING
	}
	return known
}

// locked returns a volume's worker and device while nothing else changes the volume.
func (s *service) locked(ctx context.Context, id string) (w *process, device string, unlock func(), err error) {
	unlock, err = s.calls.lock(ctx, id)
	if err != nil {
		return nil, "", nil, err
	}
	w, device, err = s.worker(ctx, id)
	if err != nil {
		unlock()
		return nil, "", nil, err
	}
	return w, device, unlock, nil
}

func (s *service) Resize(ctx context.Context, r *api.ResizeRequest) (*api.ResizeResponse, error) {
	w, _, unlock, err := s.locked(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx, cancel := s.outlive(ctx)
	defer cancel()
	reply, err := w.api.Resize(ctx, r)
	return reply, w.explain(err)
}

// frozenSnapshot takes a snapshot while the file system of the helper's directory is frozen.
func (s *service) frozenSnapshot(
	ctx context.Context, c *snapshotCall, w *process, device string, h *helper.Helper,
) (*api.Snapshot, error) {
	f, err := s.freezeFS(ctx, c.volume, device, h, cmp.Or(s.options.hooks.maxFrozen, maxFrozen))
	if err != nil {
		return nil, err
	}
	defer func() { // whatever happens
		_ = f.thaw()
		if !f.foreign {
			s.metrics.frozen.Observe(f.lasted.Seconds())
		}
	}()
	if s.options.hooks.frozen != nil {
		s.options.hooks.frozen()
	}
	snapshot, err := w.createSnapshot(ctx, c.name, func(future *api.Snapshot) {
		if f.thaw() == nil { // what is not good is not announced
			c.announce(future)
		}
	})
	if lost := f.thaw(); err == nil && lost != nil {
		_, deleteErr := w.api.DeleteSnapshot(ctx, &api.DeleteSnapshotRequest{VolumeId: c.volume, Name: c.name})
		return nil, errors.Join(lost, deleteErr)
	}
	return snapshot, err
}

func (s *service) DeleteSnapshot(ctx context.Context, r *api.DeleteSnapshotRequest) (*api.DeleteSnapshotResponse, error) {
	if err := checkSnapshotName(r.GetName()); err != nil {
		return nil, err
	}
	w, _, unlock, err := s.locked(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx, cancel := s.outlive(ctx)
	defer cancel()
	start := time.Now()
	reply, err := w.api.DeleteSnapshot(ctx, r)
	s.metrics.snapshot("delete", start, err)
	if err != nil {
		return nil, w.explain(err)
	}
	return reply, s.openedPool().EndPendingSnapshot(r.GetVolumeId(), r.GetName())
}

func (s *service) ListSnapshots(ctx context.Context, r *api.ListSnapshotsRequest) (*api.ListSnapshotsResponse, error) {
	w, _, err := s.worker(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	pending := s.pendingSnapshot(r.GetVolumeId()) // first: it may be in the table a moment later
	reply, err := w.api.ListSnapshots(ctx, r)
	if err != nil {
		return nil, w.explain(err)
	}
	listed := func(row *api.Snapshot) bool { return row.GetName() == pending.GetName() }
	if pending != nil && !slices.ContainsFunc(reply.GetSnapshots(), listed) {
		reply.Snapshots = append(reply.Snapshots, pending)
	}
	return reply, nil
}

func (s *service) Blank(ctx context.Context, r *api.BlankRequest) (*api.BlankResponse, error) {
	w, _, err := s.worker(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	reply, err := w.api.Blank(ctx, r)
	return reply, w.explain(err)
}

func checkSnapshotName(name string) error {
	if name == "" || IsReservedSnapshot(name) {
		return fmt.Errorf("%w: snapshot name %q", ErrInvalid, name)
	}
	return nil
}

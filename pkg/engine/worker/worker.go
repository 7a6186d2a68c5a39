// Package worker serves one attached volume, in a process of its own: it owns the image and serves the block device, and hands
// both to the next worker, by way of the holder, when it ends before the volume is detached.
package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// ControlFD is the descriptor on which a worker inherits the connection to its supervisor.
const ControlFD = 3

// errSupervisorGone is why a worker ends while it still serves its volume.
var errSupervisorGone = errors.New("the supervisor is gone")

// Options say what a worker process serves.
type Options struct {
	PoolDir string
	Volume  string // its ID
	Holder  string // path of the holder's socket
	Journal bool   // see engine.Options
	Rest    func() // called, if not nil, when nobody has used the volume for a while
}

// Run is the body of a worker process: it serves one volume of a pool, as told over the inherited
// connection, until the connection or ctx ends. A volume that is attached then is flushed and left to a next worker:
// its users wait. The process must end when Run returns, at once after an error: it may still hold the volume.
func Run(ctx context.Context, o Options) error {
	f := os.NewFile(ControlFD, "supervisor")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("inherited connection to the supervisor: %w", err)
	}
	return serveWorker(ctx, conn, o)
}

// worker serves the control API for one volume.
type worker struct {
	api.UnimplementedEngineServer
	options Options
	broken  chan error // has one when the process must end

	// mu serialises Attach, Detach, Resize and the snapshot calls.
	mu sync.Mutex
	// current is nil while the volume is not attached. Changed under mu, read without.
	current atomic.Pointer[served]
	ended   bool // the supervisor is gone; guarded by mu
}

func serveWorker(ctx context.Context, conn net.Conn, o Options) error {
	w := &worker{options: o, broken: make(chan error, 1)}
	ended := make(chan error, 1)
	go func() { ended <- w.run(ctx, conn) }()
	select {
	case err := <-ended:
		return err
	case err := <-w.broken: // neither the volume nor calls can be brought to an end: only the process can
		return fmt.Errorf("%s: %w", o.Volume, err)
	}
}

// run serves until the connection or ctx ends.
func (w *worker) run(ctx context.Context, conn net.Conn) error {
	server := rpc.NewServer(rpc.WorkerLogLevel)
	api.RegisterEngineServer(server, w)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	err := server.Serve(newOneConn(conn))
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	err = errors.Join(err, w.leave())
	server.Stop() // waits for the calls that still run
	return err
}

// leave leaves an attached volume to a next worker when this one has lost its supervisor. It does not wait for calls that
// run: they fail.
func (w *worker) leave() error {
	if s := w.current.Swap(nil); s != nil {
		return w.leaveServed(s)
	}
	w.mu.Lock() // a call may be attaching it just now
	defer w.mu.Unlock()
	w.ended = true
	if s := w.current.Swap(nil); s != nil {
		return w.leaveServed(s)
	}
	return nil
}

func (w *worker) leaveServed(s *served) error {
	klog.InfoS("Leaving the device to a next worker", "volume", w.options.Volume, "device", s.dev.Path())
	return s.leave()
}

// attached returns the volume, or rpc.ErrNotAttached.
func (w *worker) attached() (*served, error) {
	if s := w.current.Load(); s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("%s: %w", w.options.Volume, rpc.ErrNotAttached)
}

func (w *worker) Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.current.Load()
	if s == nil {
		if w.ended {
			return nil, errSupervisorGone
		}
		var err error
		if s, err = serve(context.WithoutCancel(ctx), w.options, r.GetAvoid(), w.broken); err != nil {
			return nil, err
		}
		w.current.Store(s)
	}
	dev, inode := s.dev.File()
	return &api.AttachResponse{Device: s.dev.Path(), FileDevice: dev, FileInode: inode}, nil
}

func (w *worker) Detach(ctx context.Context, _ *api.DetachRequest) (*api.DetachResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.current.Load(); s != nil {
		if err := s.endDevice(context.WithoutCancel(ctx)); err != nil {
			return nil, err
		}
		if !w.current.CompareAndSwap(s, nil) {
			return nil, errSupervisorGone
		}
		if err := s.close(); err != nil {
			return nil, err
		}
	}
	return &api.DetachResponse{}, nil
}

// List returns the one volume. It does not wait for other calls: the supervisor asks it whether all is well.
func (w *worker) List(context.Context, *api.ListRequest) (*api.ListResponse, error) {
	s := w.current.Load()
	if s == nil {
		return &api.ListResponse{}, nil
	}
	a := &api.Attachment{
		VolumeId: w.options.Volume, Device: s.dev.Path(), Size: s.img.Size(), WorkerPid: int32(os.Getpid()),
		Operations: s.backend.operations(), Phases: s.phases.report(), Corrupt: s.backend.corrupted.Load(),
	}
	s.checkDevice(checkPatience)
	a.FileDevice, a.FileInode = s.dev.File()
	if err := s.failure(); err != nil {
		a.State, a.Failure = api.State_FAILED, err.Error()
	} else if waited := s.stalled(); waited > 0 {
		a.State, a.Failure = api.State_STALLED, fmt.Sprintf("no request was answered for %v", waited.Round(time.Second))
	}
	return &api.ListResponse{Attachments: []*api.Attachment{a}}, nil
}

func (w *worker) Resize(ctx context.Context, r *api.ResizeRequest) (*api.ResizeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	if r.GetSize() > s.img.Size() {
		if err := s.img.Resize(context.WithoutCancel(ctx), r.GetSize()); err != nil {
			return nil, err
		}
	}
	// Also when the image was large enough: an earlier call may have failed here.
	if err := s.recordSize(r.GetAsked()); err != nil {
		return nil, err
	}
	if err := s.dev.Resize(); err != nil {
		return nil, fmt.Errorf("resize %s: %w", s.dev.Path(), err)
	}
	return &api.ResizeResponse{Size: s.img.Size()}, nil
}

// CreateSnapshot sends the response's header at the instant whose state the snapshot holds. Like all that changes the image it goes
// on when the supervisor ends meanwhile: the next one finds what was begun.
func (w *worker) CreateSnapshot(ctx context.Context, r *api.CreateSnapshotRequest) (*api.CreateSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	snapshot, err := s.img.CreateSnapshot(context.WithoutCancel(ctx), r.GetName(), func(s qcow2.Snapshot) { rpc.SendCut(ctx, s) })
	if errors.Is(err, qcow2.ErrExists) {
		snapshot, err = s.img.FindSnapshot(qcow2.ByName(r.GetName()))
	}
	if err != nil {
		return nil, err
	}
	return &api.CreateSnapshotResponse{Snapshot: rpc.SnapshotToAPI(snapshot)}, nil
}

func (w *worker) DeleteSnapshot(ctx context.Context, r *api.DeleteSnapshotRequest) (*api.DeleteSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	err = s.img.DeleteSnapshot(context.WithoutCancel(ctx), qcow2.ByName(r.GetName()))
	if err != nil && !errors.Is(err, qcow2.ErrNotFound) {
		return nil, err
	}
	return &api.DeleteSnapshotResponse{}, nil
}

func (w *worker) ListSnapshots(context.Context, *api.ListSnapshotsRequest) (*api.ListSnapshotsResponse, error) {
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	r := &api.ListSnapshotsResponse{}
	for _, snapshot := range s.img.Snapshots() {
		if !IsReservedSnapshot(snapshot.Name) {
			r.Snapshots = append(r.Snapshots, rpc.SnapshotToAPI(snapshot))
		}
	}
	return r, nil
}

func (w *worker) Blank(context.Context, *api.BlankRequest) (*api.BlankResponse, error) {
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	blank, err := s.img.Blank()
	return &api.BlankResponse{Blank: blank}, err
}

func (w *worker) Clone(_ context.Context, r *api.CloneRequest) (*api.CloneResponse, error) {
	c, err := w.startClone(r)
	if err != nil {
		return nil, err
	}
	if err := c.run(r.GetTarget(), r.GetSize()); err != nil {
		return nil, err
	}
	return &api.CloneResponse{}, nil
}

// startClone opens what is to be cloned. Only this waits for other calls.
func (w *worker) startClone(r *api.CloneRequest) (*clone, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, err := w.attached()
	if err != nil {
		return nil, err
	}
	return s.openClone(r.GetSnapshot())
}

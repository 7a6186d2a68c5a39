package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// errClosing is the answer of an engine that is shutting down.
var errClosing = fmt.Errorf("%w: it is shutting down", ErrUnavailable)

// lockName is the file in the pool whose lock says that an engine serves it.
const lockName = "engine.lock"

// supervisor keeps one worker process per attached volume. All that it knows can be found again: by the
// devices' names, the pool, and the markers of frozen file systems.
type supervisor struct {
	options Options
	metrics *metrics
	fds     *fdStore
	// calls serialises what changes one volume. Taken before mu.
	calls   keyLock
	opening sync.Mutex     // held while the pool is opened; taken before mu
	tasks   sync.WaitGroup // watchers of workers, clones and snapshot calls

	mu        sync.Mutex // guards what follows
	pool      *pool.Pool // nil until it is ready
	lockFile  *os.File
	closing   bool
	attached  map[string]*attachment
	clones    map[string]*cloneCall // by target
	snapshots []*snapshotCall       // that run
}

// attachment is a volume with a worker, or one that lost it.
type attachment struct {
	worker  *process // nil: failed
	device  string
	failure string
}

func newSupervisor(o Options) *supervisor {
	return &supervisor{
		options: o, metrics: newMetrics(), fds: newFDStore(tokenLifetime),
		attached: map[string]*attachment{}, clones: map[string]*cloneCall{},
	}
}

// open makes the pool ready: nothing else may serve it, and what a dead engine left is put away.
// pool.ErrNotReady while it is not there; nothing is created then.
func (s *supervisor) open(ctx context.Context) error {
	s.opening.Lock()
	defer s.opening.Unlock()
	s.mu.Lock()
	opened, closing := s.pool != nil, s.closing
	s.mu.Unlock()
	switch {
	case closing:
		return errClosing
	case opened:
		return nil
	}
	p, err := pool.Open(s.options.PoolDir)
	if err != nil {
		return err
	}
	lock, err := lockPool(p)
	if err != nil {
		return err
	}
	failed := recoverPool(ctx, p, cmp.Or(s.options.hooks.orphanPatience, orphanPatience))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pool, s.lockFile, s.attached = p, lock, failed
	klog.InfoS("Pool is ready", "pool", p.Dir(), "uuid", p.UUID())
	return nil
}

// lockPool makes this the only engine of a pool, until the file is closed or the process ends.
func lockPool(p *pool.Pool) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(p.Dir(), lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("pool %s: %w", p.Dir(), errOtherEngine)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

func (s *supervisor) openedPool() *pool.Pool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pool
}

// ready returns the pool. An engine that started before its pool was mounted opens it here.
func (s *supervisor) ready(ctx context.Context) (*pool.Pool, error) {
	s.mu.Lock()
	p, closing := s.pool, s.closing
	s.mu.Unlock()
	if closing {
		return nil, errClosing
	}
	if p != nil {
		return p, nil
	}
	if err := s.open(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return s.openedPool(), nil
}

func (s *supervisor) find(id string) *attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.attached[id]
}

// set records what a volume's attachment is now; nil: it has none.
func (s *supervisor) set(id string, a *attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a == nil {
		delete(s.attached, id)
		return
	}
	s.attached[id] = a
}

// attachments returns a copy of the table.
func (s *supervisor) attachments() map[string]*attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.attached)
}

// worker returns the live worker of a volume: pool.ErrNotFound, pool.ErrBadID, or ErrNotAttached.
func (s *supervisor) worker(ctx context.Context, id string) (*process, string, error) {
	p, err := s.ready(ctx)
	if err != nil {
		return nil, "", err
	}
	a := s.find(id)
	if a != nil && a.worker != nil {
		return a.worker, a.device, nil
	}
	if _, err := p.Volume(id); err != nil {
		return nil, "", err
	}
	if a != nil {
		return nil, "", fmt.Errorf("%s: %w: %s", id, ErrNotAttached, a.failure)
	}
	return nil, "", fmt.Errorf("%s: %w", id, ErrNotAttached)
}

// start starts a worker that serves the volume.
func (s *supervisor) start(ctx context.Context, p *pool.Pool, id string) (*attachment, error) {
	w, err := startProcess(s.options.WorkerCommand, p.Dir(), id)
	if err != nil {
		return nil, err
	}
	r, err := w.api.Attach(ctx, &api.AttachRequest{VolumeId: id})
	if err != nil {
		w.stop()
		return nil, w.explain(err)
	}
	a := &attachment{worker: w, device: r.GetDevice()}
	if err := s.watch(id, a); err != nil {
		w.stop()
		return nil, err
	}
	return a, nil
}

// watch records a new attachment, and notices when its worker dies.
func (s *supervisor) watch(id string, a *attachment) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing { // shutDown may have taken its list of volumes already
		return errClosing
	}
	s.attached[id] = a
	s.tasks.Go(func() {
		<-a.worker.done
		s.lost(id, a)
	})
	return nil
}

// lost marks a volume as failed if its worker has died while it was attached.
func (s *supervisor) lost(id string, a *attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attached[id] != a {
		return
	}
	reason := a.worker.death()
	klog.ErrorS(reason, "Volume failed: its users get I/O errors", "volume", id, "device", a.device)
	s.attached[id] = &attachment{device: a.device, failure: reason.Error()}
}

// shutDown detaches every volume, and aborts those that are in use. A second call finds nothing to do.
func (s *supervisor) shutDown(ctx context.Context) {
	s.opening.Lock()
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.opening.Unlock()
	var volumes sync.WaitGroup
	for id := range s.attachments() {
		volumes.Go(func() { s.shutDownVolume(ctx, id) })
	}
	volumes.Wait()
	s.tasks.Wait()
	s.fds.closeAll()
	if s.lockFile != nil {
		s.lockFile.Close()
	}
}

func (s *supervisor) shutDownVolume(ctx context.Context, id string) {
	start := time.Now()
	patience, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	unlock, err := s.calls.lock(patience, id) // a call that runs may end first
	if err == nil {
		defer unlock()
	}
	a := s.find(id)
	if a == nil {
		return
	}
	s.set(id, nil)
	if a.worker == nil {
		err = clearDevices(s.openedPool(), id)
	} else {
		if err == nil {
			_, err = a.worker.api.Detach(patience, &api.DetachRequest{VolumeId: id})
		}
		a.worker.stop() // aborts what is not detached
	}
	if err != nil {
		klog.ErrorS(err, "Volume was not detached: whoever uses it gets I/O errors", "volume", id,
			"device", a.device, "duration", time.Since(start))
		return
	}
	klog.InfoS("Detached", "volume", id, "device", a.device, "duration", time.Since(start))
}

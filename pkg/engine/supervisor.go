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
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// errClosing is the answer of an engine that is shutting down.
var errClosing = rpc.Refuse(ErrUnavailable, "the engine is shutting down, another one follows")

// lockPoll is how often an engine that stands by looks whether its turn has come.
const lockPoll = 2 * time.Millisecond

// supervisor keeps one worker process per attached volume. All that it knows can be found again: by the
// devices' names, the pool, and the markers of frozen file systems.
type supervisor struct {
	options Options
	metrics *metrics
	fds     *fdStore
	// calls serialises what changes one volume. Taken before mu.
	calls keyLock
	// workers serialises the starts and ends of one volume's workers. A call that holds calls alone may wait, to thaw a file
	// system, for I/O that a new worker will do. Taken after calls, before mu.
	workers keyLock
	opening sync.Mutex     // held while the pool is opened; taken before mu
	tasks   sync.WaitGroup // watchers of workers, clones and snapshot calls
	devices assignedDevices
	holder  holder.Client
	// ownHolder: the holder is part of this engine and ends with it.
	ownHolder bool
	// running ends when the engine begins to shut down.
	running context.Context //nolint:containedctx // of all that the supervisor does by itself
	close   context.CancelFunc

	mu        sync.Mutex // guards what follows
	pool      *pool.Pool // nil until its lock is held
	recovered bool       // what an earlier engine left has been taken up: calls may begin
	lostPool  error      // the pool is open, and not to be used: see awaitLoss
	lockFile  *os.File
	closing   bool
	attached  map[string]*attachment
	clones    map[string]*cloneCall // by target
	snapshots []*snapshotCall       // that run
	standbys  map[string]*process   // by volume: wait for the running engine to end
	freezes   map[string]*freeze    // by volume: that are not over
}

// lockVolume takes calls and workers.
func (s *supervisor) lockVolume(ctx context.Context, id string) (unlock func(), err error) {
	unlockCalls, err := s.calls.lock(ctx, id)
	if err != nil {
		return nil, err
	}
	unlockWorkers, err := s.workers.lock(ctx, id)
	if err != nil {
		unlockCalls()
		return nil, err
	}
	return func() { unlockWorkers(); unlockCalls() }, nil
}

// attachment is a volume with a worker, or one that lost it.
type attachment struct {
	worker  *process // nil: failed, or waiting
	started time.Time
	waiting bool // another worker is being started
	device  string
	file    fileID
	failure string
	deaths  int // of workers
}

// fileID is the identity of the file that a device is bound to.
type fileID struct{ device, inode uint64 }

// replacing says of a waiting attachment why nobody answers for its volume.
func (a *attachment) replacing() error {
	return rpc.Refuse(ErrUnavailable, "another worker is being started for it: %s", a.failure)
}

func (a *attachment) response() *api.AttachResponse {
	return &api.AttachResponse{Device: a.device, FileDevice: a.file.device, FileInode: a.file.inode}
}

func newSupervisor(ctx context.Context, o Options) *supervisor {
	s := &supervisor{
		options: o, metrics: newMetrics(), fds: newFDStore(tokenLifetime), holder: holder.Client{Path: o.Holder},
		attached: map[string]*attachment{}, clones: map[string]*cloneCall{}, standbys: map[string]*process{},
		freezes: map[string]*freeze{},
	}
	s.running, s.close = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

// open makes the pool ready: nothing else may serve it, and what a dead engine left is put away.
// pool.ErrNotReady while it is not there; nothing is created then.
func (s *supervisor) open(ctx context.Context) error {
	s.opening.Lock()
	defer s.opening.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.running, cancel)()
	s.mu.Lock()
	opened, closing := s.recovered, s.closing
	s.mu.Unlock()
	switch {
	case closing:
		return errClosing
	case opened:
		return nil
	}
	p, err := pool.OpenOn(s.options.PoolDir, s.options.NodeID)
	if err != nil {
		return err
	}
	lock, err := s.lockPool(ctx, p)
	if err != nil {
		return err
	}
	held, err := s.held(ctx, p)
	if err != nil {
		lock.Close()
		return err
	}
	s.devices.read(p)
	s.mu.Lock()
	s.pool, s.lockFile = p, lock
	s.mu.Unlock()
	s.recoverPool(ctx, p, held, cmp.Or(s.options.hooks.orphanPatience, worker.OrphanPatience))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recovered = true
	klog.InfoS("Pool is ready", "pool", p.Dir(), "uuid", p.UUID())
	return nil
}

// lockPool makes this the only engine of a pool, until the file is closed or the process ends. One that could take over
// the volumes of another waits for it to end.
func (s *supervisor) lockPool(ctx context.Context, p *pool.Pool) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(p.Dir(), pool.EngineLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for waited := false; ; waited = true {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("lock %s: %w", f.Name(), err)
			break
		}
		err = fmt.Errorf("pool %s: %w", p.Dir(), errOtherEngine)
		if s.ownHolder {
			break
		}
		if !waited {
			held, unreachable := s.held(ctx, p)
			if unreachable != nil {
				err = unreachable
				break
			}
			s.startStandbys(ctx, p, held)
			klog.InfoS("Standing by until the running engine ends", "pool", p.Dir())
			s.options.ready()
		}
		if !sleepUntil(ctx, time.Now().Add(lockPoll)) {
			break
		}
	}
	f.Close()
	return nil, err
}

func (s *supervisor) openedPool() *pool.Pool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pool
}

// ready returns the pool. An engine that started before its pool was mounted opens it here.
func (s *supervisor) ready(ctx context.Context) (*pool.Pool, error) {
	s.mu.Lock()
	p, recovered, closing := s.pool, s.recovered, s.closing
	s.mu.Unlock()
	if closing {
		return nil, errClosing
	}
	if recovered {
		return p, nil
	}
	err := s.open(ctx)
	if p = s.openedPool(); err == nil && p == nil {
		err = fmt.Errorf("%w: it was lost just now", pool.ErrNotReady)
	}
	if err != nil {
		return nil, rpc.Refuse(ErrUnavailable, "%w", err)
	}
	return p, nil
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
	if a != nil && a.waiting {
		return nil, "", a.replacing()
	}
	if a != nil {
		return nil, "", rpc.Refuse(ErrNotAttached, "it has failed: %s", a.failure)
	}
	return nil, "", fmt.Errorf("%s: %w", id, ErrNotAttached)
}

// start starts a worker that serves the volume, as none of the devices to avoid unless the volume had it before.
func (s *supervisor) start(ctx context.Context, p *pool.Pool, id string, avoid ...string) (*attachment, error) {
	a := &attachment{started: time.Now()}
	w := s.takeStandby(id)
	if w == nil {
		var err error
		if w, err = s.startWorker(p, id); err != nil {
			return nil, err
		}
	}
	r, err := w.api.Attach(ctx, &api.AttachRequest{VolumeId: id, Avoid: s.devices.avoid(id, avoid)})
	if err != nil {
		if ctx.Err() != nil { // it hangs
			_ = w.cmd.Process.Kill()
		}
		w.stop()
		return nil, w.explain(err)
	}
	a.worker, a.device, a.file = w, r.GetDevice(), fileID{r.GetFileDevice(), r.GetFileInode()}
	s.devices.add(p, id, a.device)
	if err := s.watch(id, a); err != nil {
		w.stopWithin(leavePatience)
		return nil, err
	}
	return a, nil
}

func (s *supervisor) startWorker(p *pool.Pool, id string) (*process, error) {
	return startProcess(s.options.WorkerCommand, worker.Options{
		PoolDir: p.Dir(), Volume: id, Holder: s.options.Holder, Journal: s.options.Journal,
	})
}

// watch records a new attachment, and notices when its worker dies.
func (s *supervisor) watch(id string, a *attachment) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing { // shutDown may have taken its list of volumes already
		return errClosing
	}
	if before := s.attached[id]; before != nil && before.waiting {
		a.deaths = before.deaths
	}
	s.attached[id] = a
	s.tasks.Go(func() {
		select {
		case <-a.worker.done:
			s.lost(id, a)
		case <-s.running.Done():
		}
	})
	return nil
}

// outlive returns a context for what goes on when its caller is gone, until the engine shuts down.
func (s *supervisor) outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(s.running, cancel)
	return ctx, func() { stop(); cancel() }
}

// shutDown leaves every volume to the next engine, which may take over before this one has ended: nothing that is waited for
// here must keep it. If there can be none, for the holder ends too, it detaches the volumes, and aborts those that are in use.
// A second call finds nothing to do.
func (s *supervisor) shutDown(ctx context.Context) {
	s.close() // what runs ends: calls, and the guard of what is held
	s.opening.Lock()
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.opening.Unlock()
	s.fds.closeAll()
	var volumes sync.WaitGroup
	attached := s.attachments()
	if s.ownHolder {
		for id := range attached {
			volumes.Go(func() { s.shutDownVolume(ctx, id) })
		}
	} else {
		for id, a := range attached {
			if a.worker != nil {
				a.worker.conn.Close()
				volumes.Go(func() { leave(id, a) })
			}
		}
		s.unlockPool()
	}
	volumes.Wait()
	s.tasks.Wait()
	s.dropStandbys(func(string) bool { return false })
	s.unlockPool()
}

func (s *supervisor) unlockPool() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lockFile != nil {
		s.lockFile.Close()
		s.lockFile = nil
	}
}

// leave waits until a volume's worker has left it to the next engine.
func leave(id string, a *attachment) {
	start := time.Now()
	a.worker.stopWithin(leavePatience)
	klog.InfoS("Left to the next engine", "volume", id, "device", a.device, "duration", time.Since(start))
}

// ended puts away what there was of a volume that has been detached.
func (s *supervisor) ended(ctx context.Context, p *pool.Pool, id string) {
	if s.devices.count(id) > 1 {
		if err := s.clearDevices(ctx, p, id); err != nil {
			// Whoever has it open keeps a dead device, which goes with its last user.
			klog.ErrorS(err, "An earlier device of the volume stays", "volume", id)
		}
	}
	s.devices.forget(p, id)
}

func (s *supervisor) shutDownVolume(ctx context.Context, id string) {
	start := time.Now()
	patience, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	unlock, err := s.lockVolume(patience, id) // a call that runs may end first
	if err == nil {
		defer unlock()
	}
	a := s.find(id)
	if a == nil {
		return
	}
	s.set(id, nil)
	if a.worker == nil {
		err = errors.Join(worker.Discard(ctx, s.holder, id), s.clearDevices(ctx, s.openedPool(), id))
	} else {
		if err == nil {
			_, err = a.worker.api.Detach(patience, &api.DetachRequest{VolumeId: id})
		}
		if err != nil {
			err = errors.Join(err, worker.Discard(ctx, s.holder, id))
		}
		a.worker.stop()
	}
	if err != nil {
		klog.ErrorS(err, "Volume was not detached: whoever uses it gets I/O errors", "volume", id,
			"device", a.device, "duration", time.Since(start))
		return
	}
	s.ended(ctx, s.openedPool(), id)
	klog.InfoS("Detached", "volume", id, "device", a.device, "duration", time.Since(start))
}

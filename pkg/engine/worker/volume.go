package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	// OrphanPatience is how long whoever takes a volume over waits for the worker before: it flushes and exits when it loses its
	// supervisor.
	OrphanPatience = 10 * time.Second
	// OrphanPoll is how often it looks meanwhile.
	OrphanPoll = 20 * time.Millisecond
)

// DevicePrefix begins the name of each of our loop devices; the volume ID, at most 58 bytes, follows.
const DevicePrefix = "csiq:"

// served is a volume that this process owns and serves: its lease, its image and its device.
type served struct {
	options Options
	lease   *pool.Lease
	img     *qcow2.Image
	log     *redoMemory
	backend *backend
	dev     *blockdev.Device
	holder  holder.Client
	broken  chan<- error

	look     look // at the loop device
	restorer restorer
	phases   phaseTimes

	// leaky: the image may have leaks of an earlier, unclean stop.
	leaky atomic.Bool

	// lastAnswer is when no request was waiting, or one was answered, in nanoseconds.
	lastAnswer atomic.Int64

	// tasks counts what uses img besides the device: Clones, and what is put in order after a crash; stopTasks ends them.
	tasks     sync.WaitGroup
	tasksCtx  context.Context // common to all tasks
	stopTasks context.CancelFunc
}

// serve takes a volume and makes a device of it, or goes on with the one that an earlier worker has left. Its tasks end
// with ctx. The process must end when there is something in broken.
func serve(ctx context.Context, o Options, avoid []string, broken chan<- error) (*served, error) {
	p, err := pool.Open(o.PoolDir)
	if err != nil {
		return nil, err
	}
	at := holder.Client{Path: o.Holder}
	k, err := getKept(ctx, at, o.Volume)
	if err != nil {
		return nil, err
	}
	if k != nil {
		// Whoever served it may be about to end.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, OrphanPatience)
		defer cancel()
	}
	lease, err := outwait(ctx, k != nil, func() (*pool.Lease, error) { return p.Lock(o.Volume) })
	if err == nil {
		s := &served{options: o, lease: lease, holder: at, broken: broken}
		if err = s.begin(ctx, k, avoid); err == nil {
			return s, nil
		}
		err = errors.Join(err, lease.Unlock())
	}
	if k != nil {
		k.close()
	}
	return nil, err
}

// outwait tries again while somebody else has what is wanted, if patient, until ctx ends.
func outwait[T any](ctx context.Context, patient bool, try func() (T, error)) (T, error) {
	tick := time.NewTicker(OrphanPoll)
	defer tick.Stop()
	for {
		t, err := try()
		if !patient || !errors.Is(err, pool.ErrInUse) {
			return t, err
		}
		select {
		case <-ctx.Done():
			return t, err
		case <-tick.C:
		}
	}
}

// begin opens the image of the leased volume and serves it. k, if not nil, is what an earlier worker has left; the caller
// closes it when begin fails.
func (s *served) begin(ctx context.Context, k *kept, avoid []string) error {
	volume := s.lease.Volume().ID
	if s.lease.Volume().Tombstone {
		return fmt.Errorf("%s: %w", volume, rpc.ErrTombstone)
	}
	unclean, err := s.lease.WasUnclean()
	if err != nil {
		return err
	}
	if err := s.lease.MarkAttached(); err != nil {
		return err
	}
	if err := s.openImage(ctx, k); err != nil {
		return err
	}
	if err := s.openDevice(ctx, k, avoid); err != nil {
		return errors.Join(fmt.Errorf("attach %s: %w", volume, err), s.img.Close())
	}
	if err := s.recordSize(0); err != nil {
		klog.ErrorS(err, "A revert may make the volume smaller than it is", "volume", volume)
	}
	s.tasksCtx, s.stopTasks = context.WithCancel(context.WithoutCancel(ctx))
	orphans := reservedSnapshots(s.img)
	s.leaky.Store(unclean)
	s.lastAnswer.Store(time.Now().UnixNano())
	s.tasks.Go(s.watch)
	s.tasks.Go(s.trim)
	s.tasks.Go(func() {
		sweepClones(s.tasksCtx, s.img, volume, orphans)
		if unclean {
			s.reclaimLeaks()
		}
	})
	return nil
}

// recordSize makes sure that the volume is known to be as large as its image, and what was asked when it got that size; 0:
// nothing was.
func (s *served) recordSize(asked int64) error {
	size := s.img.Size()
	has := s.lease.Volume()
	if size <= has.LeastSize() && (asked == 0 || asked >= has.AskedFor(size)) {
		return nil
	}
	return s.lease.Update(func(v *pool.Volume) {
		if size > v.LeastSize() {
			v.Grown = size
		}
		v.Ask(asked, size)
	})
}

// openImage commits first what an earlier worker had acknowledged and not committed.
func (s *served) openImage(ctx context.Context, k *kept) error {
	log, err := newRedoMemory()
	if err != nil {
		return err
	}
	if k != nil {
		log.close()
		log = k.log
	}
	redo, err := log.log()
	if err == nil {
		s.img, err = outwait(ctx, k != nil, func() (*qcow2.Image, error) { return s.lease.OpenServed(redo, s.phases.note) })
	}
	if err != nil {
		if k == nil {
			log.close()
		}
		return err
	}
	s.log, s.backend = log, &backend{Image: s.img, discarded: make(chan struct{}, 1)}
	return nil
}

// openDevice goes on with the kept device, or makes one that is kept from now on, and is none of those to avoid.
func (s *served) openDevice(ctx context.Context, k *kept, avoid []string) (err error) {
	volume := s.lease.Volume().ID
	o := blockdev.Options{
		Name: DevicePrefix + volume, DiscardGranularity: int(s.img.ClusterSize()), Errno: errno,
		Journal: s.options.Journal, Broken: func(err error) { s.broken <- err }, Avoid: avoid,
		Restore: func(fd int, want []byte) error { return s.restorer.restore(context.WithoutCancel(ctx), fd, want) },
		Keep:    func(fd int) error { return keepLoop(context.WithoutCancel(ctx), s.holder, volume, fd) },
	}
	if k != nil {
		s.dev, err = blockdev.Resume(s.backend, o, k.device)
		if !errors.Is(err, blockdev.ErrGone) {
			return err
		}
		if err := drop(ctx, s.holder, volume); err != nil {
			return err
		}
		k.device.Close()
	}
	if s.dev, err = blockdev.Attach(s.backend, o); err != nil {
		return err
	}
	if err := keep(ctx, s.holder, volume, s.dev, s.log); err != nil {
		return errors.Join(err, s.dev.Detach())
	}
	return nil
}

// endDevice ends the device; rpc.ErrInUse, and nothing changed, while somebody has it open.
func (s *served) endDevice(ctx context.Context) error {
	err := s.dev.Detach()
	if errors.Is(err, blockdev.ErrBusy) {
		return rpc.Refuse(rpc.ErrInUse, "something on the node has %[1]s open: end what `fuser -vm %[1]s` shows there", s.dev.Path())
	}
	return errors.Join(err, drop(ctx, s.holder, s.lease.Volume().ID))
}

// close ends what reads the image, flushes and closes the image, and lets go of the volume. The device
// has been ended.
func (s *served) close() error {
	return errors.Join(s.closeImage(), s.lease.Unlock())
}

// leave leaves the device to another worker. The process must end then, and with it the lease: until then its threads may
// still take requests, which the next worker would miss.
func (s *served) leave() error {
	s.dev.Leave()
	return s.closeImage()
}

func (s *served) closeImage() error {
	s.stopTasks()
	s.tasks.Wait()
	err := s.img.Close()
	if err == nil && !s.leaky.Load() {
		s.markClean()
	}
	return err
}

// failure says why nothing is served any more; nil while all is well.
func (s *served) failure() error {
	if err := s.backend.failed.Load(); err != nil {
		return *err
	}
	if err := s.look.failure(); err != nil {
		return err
	}
	select {
	case <-s.dev.Done():
		return fmt.Errorf("the connection of %s has ended", s.dev.Path())
	default:
		return nil
	}
}

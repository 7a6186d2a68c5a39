package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// served is a volume that this process owns and serves: its lease, its image and its device.
type served struct {
	lease   *pool.Lease
	img     *qcow2.Image
	backend *backend
	dev     *blockdev.Device

	// leaky: the image may have leaks of an earlier, unclean stop.
	leaky atomic.Bool

	// tasks counts what uses img besides the device: Clones, and the search for leaks; stopTasks ends them.
	tasks     sync.WaitGroup
	tasksCtx  context.Context // common to all tasks
	stopTasks context.CancelFunc
}

// serve takes a volume and makes a device of it. Its tasks end with ctx.
func serve(ctx context.Context, poolDir, volume string) (*served, error) {
	p, err := pool.Open(poolDir)
	if err != nil {
		return nil, err
	}
	lease, err := p.Lock(volume)
	if err != nil {
		return nil, err
	}
	s, err := serveLeased(ctx, lease, volume)
	if err != nil {
		return nil, errors.Join(err, lease.Unlock())
	}
	return s, nil
}

func serveLeased(ctx context.Context, lease *pool.Lease, volume string) (*served, error) {
	if lease.Volume().Tombstone {
		return nil, fmt.Errorf("%s: %w", volume, ErrTombstone)
	}
	unclean, err := lease.WasUnclean()
	if err != nil {
		return nil, err
	}
	if err := lease.MarkAttached(); err != nil {
		return nil, err
	}
	img, err := lease.Open(false)
	if err != nil {
		return nil, err
	}
	sweepClones(img, volume)
	b := &backend{Image: img}
	dev, err := blockdev.Attach(b, blockdev.Options{
		Name:               devicePrefix + volume,
		DiscardGranularity: int(img.ClusterSize()),
		Errno:              errno,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("attach %s: %w", volume, err), img.Close())
	}
	s := &served{lease: lease, img: img, backend: b, dev: dev}
	s.tasksCtx, s.stopTasks = context.WithCancel(ctx)
	if unclean {
		s.leaky.Store(true)
		s.tasks.Go(s.reclaimLeaks)
	}
	return s, nil
}

// endDevice ends the device; ErrInUse, and nothing changed, while somebody has it open.
func (s *served) endDevice() error {
	err := s.dev.Detach()
	if errors.Is(err, blockdev.ErrBusy) {
		return fmt.Errorf("%w: %s: %w", ErrInUse, s.dev.Path(), err)
	}
	return err
}

// close ends what reads the image, flushes and closes the image, and lets go of the volume. The device
// has been ended.
func (s *served) close() error {
	s.stopTasks()
	s.tasks.Wait()
	err := s.img.Close()
	if err == nil && !s.leaky.Load() {
		s.markClean()
	}
	return errors.Join(err, s.lease.Unlock())
}

// abort ends the device whoever uses it, and closes.
func (s *served) abort() error {
	err := s.dev.Abort()
	if err == nil {
		<-s.dev.Done()
	}
	return errors.Join(err, s.close())
}

// failure says why nothing is served any more; nil while all is well.
func (s *served) failure() error {
	if err := s.backend.failed.Load(); err != nil {
		return *err
	}
	select {
	case <-s.dev.Done():
		return fmt.Errorf("the connection of %s has ended", s.dev.Path())
	default:
		return nil
	}
}

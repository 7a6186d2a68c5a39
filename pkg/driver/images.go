package driver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// busyWait is how long an operation waits for another one on the same image before it is ABORTED: longer
// than it takes to read a snapshot table, shorter than a copy.
const busyWait = 2 * time.Second

// images opens the images of volumes that are not attached. Any number of readers share one, under one lease
// of the pool; whoever changes an image, or lets the engine have it, is alone.
type images struct {
	mu  sync.Mutex
	use map[string]*imageUse // by volume ID, guarded by mu
}

// imageUse is an image that is open, or about to be. Its fields are guarded by images.mu.
type imageUse struct {
	readers int           // that share image; 0 while it is opened, and for a writer
	changed chan struct{} // closed, and replaced, when somebody who waits should look again
	lease   *pool.Lease
	image   *qcow2.Image
}

func newImages() *images { return &images{use: map[string]*imageUse{}} }

// read calls fn with a volume's image, open for reading. Others may read at the same time.
func (s *images) read(ctx context.Context, p *pool.Pool, id string, fn func(*qcow2.Image) error) (err error) {
	use, first, err := s.enter(ctx, id, true)
	if err != nil {
		return err
	}
	if first {
		if err := use.open(p, id); err != nil {
			s.release(id, use)
			return err
		}
		s.share(use)
	}
	defer func() { err = errors.Join(err, s.releaseReader(id, use)) }()
	return fn(use.image)
}

// change calls fn with the lease of a volume, which nobody else reads or changes meanwhile.
func (s *images) change(ctx context.Context, p *pool.Pool, id string, fn func(*pool.Lease) error) (err error) {
	release, err := s.claim(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	lease, err := p.Lock(id)
	if err != nil {
		return fmt.Errorf("lock volume %s: %w", id, err)
	}
	defer func() { err = errors.Join(err, lease.Unlock()) }()
	return fn(lease)
}

// claim keeps everybody else in this process off a volume's image until release is called.
func (s *images) claim(ctx context.Context, id string) (release func(), err error) {
	use, _, err := s.enter(ctx, id, false)
	if err != nil {
		return nil, err
	}
	return func() { s.release(id, use) }, nil
}

// enter waits until the image is free, or, for a reader, until others have it open for reading. first is
// true for the one who found it free.
func (s *images) enter(ctx context.Context, id string, reader bool) (use *imageUse, first bool, err error) {
	timeout := time.NewTimer(busyWait)
	defer timeout.Stop()
	for {
		s.mu.Lock()
		use := s.use[id]
		if use == nil {
			use = &imageUse{changed: make(chan struct{})}
			s.use[id] = use
			s.mu.Unlock()
			return use, true, nil
		}
		if reader && use.readers > 0 {
			use.readers++
			s.mu.Unlock()
			return use, false, nil
		}
		changed := use.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-timeout.C:
			return nil, false, fmt.Errorf("volume %s: %w", id, errBusy)
		}
	}
}

// share lets other readers in to the image that the first has opened.
func (s *images) share(use *imageUse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	use.readers = 1
	close(use.changed)
	use.changed = make(chan struct{})
}

// releaseReader closes the image behind its last reader.
func (s *images) releaseReader(id string, use *imageUse) error {
	s.mu.Lock()
	use.readers--
	last := use.readers == 0
	s.mu.Unlock()
	if !last {
		return nil
	}
	defer s.release(id, use)
	return use.close()
}

// release gives the image back.
func (s *images) release(id string, use *imageUse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.use, id)
	close(use.changed)
}

func (u *imageUse) open(p *pool.Pool, id string) error {
	lease, err := p.Lock(id)
	if err != nil {
		return fmt.Errorf("lock volume %s: %w", id, err)
	}
	image, err := lease.Open(true)
	if err != nil {
		return errors.Join(fmt.Errorf("open volume %s: %w", id, err), lease.Unlock())
	}
	u.lease, u.image = lease, image
	return nil
}

func (u *imageUse) close() error {
	return errors.Join(u.image.Close(), u.lease.Unlock())
}

// changeImage opens an image for writing under its lease. The context that fn gets does not end with the caller's, for a call that
// is repeated would begin again what takes longer than callers wait. If this process dies meanwhile, the volume stays marked: the
// engine looks for leaks when it is attached.
func changeImage(ctx context.Context, lease *pool.Lease, fn func(context.Context, *qcow2.Image) error) error {
	unclean, err := lease.WasUnclean()
	if err != nil {
		return err
	}
	if err := lease.MarkAttached(); err != nil {
		return err
	}
	image, err := lease.Open(false)
	if err != nil {
		return fmt.Errorf("open volume %s: %w", lease.Volume().ID, err)
	}
	err = fn(context.WithoutCancel(ctx), image)
	if closeErr := image.Close(); closeErr != nil {
		return errors.Join(err, closeErr)
	}
	if !unclean {
		if markErr := lease.ClearAttached(); markErr != nil {
			klog.ErrorS(markErr, "Volume is not marked as clean", "volume", lease.Volume().ID)
		}
	}
	return err
}

// wherever runs attached, or, if the engine does not serve the volume, detached. One that is attached or
// detached between the two is tried again.
func wherever(attached, detached func() error) error {
	err := attached()
	if !errors.Is(err, engine.ErrNotAttached) {
		return err
	}
	if err = detached(); !errors.Is(err, pool.ErrInUse) {
		return err
	}
	if again := attached(); !errors.Is(again, engine.ErrNotAttached) {
		return again
	}
	return err
}

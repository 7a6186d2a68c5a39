package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A mounted file system is frozen for the instant of a snapshot, by a helper. The kernel keeps it frozen after whoever froze it
// has died, so a marker beside the image is there as long as it may be frozen, or may come to be: a freeze waits, however
// long, for processes that are in the middle of a write, and only its helper can tell when that has ended. What a helper that
// is killed leaves, the engine thaws by another one; what an engine leaves, the next one does.
//
// The order is: syncfs, marker, FIFREEZE, then the worker's cut, FITHAW, marker away. The worker must not
// stop I/O before FIFREEZE has returned, since FIFREEZE itself writes to the device.

const (
	// maxFreezing is how long it may take to sync and freeze.
	maxFreezing = time.Minute
	// maxFrozen is how long a file system may stay frozen if no cut comes.
	maxFrozen = 30 * time.Second
	// A thaw that fails is tried again after a pause that doubles.
	minThawPause = 100 * time.Millisecond
	maxThawPause = 10 * time.Second
)

// errFrozenTooLong is why a freeze fails whose time is over.
var errFrozenTooLong = errors.New("not finished in time: the volume does not answer, or a process is in the middle of a write to it")

// freeze is the file system of one volume, frozen, or perhaps about to be.
type freeze struct {
	ctx    context.Context //nolint:containedctx // ends when its time is over, or the engine
	cancel context.CancelFunc
	helper *helper.Helper
	volume string
	// foreign: somebody else had frozen the file system already, and will thaw it.
	foreign bool
	since   time.Time
	over    chan struct{} // closed when it is not frozen for sure, and the marker is gone
	thawing sync.Once
	lasted  time.Duration // how long it was frozen; read after thaw
	lost    error         // why it was not frozen all the time; read after thaw
}

// freezeFS freezes the file system of h's directory, which must be mounted from device, for at most limit. It takes over h. The
// caller calls thaw.
func (s *supervisor) freezeFS(ctx context.Context, volume, device string, h *helper.Helper, limit time.Duration) (*freeze, error) {
	freezing, cancel := context.WithTimeoutCause(ctx, cmp.Or(s.options.hooks.maxFreezing, maxFreezing), errFrozenTooLong)
	defer cancel()
	f := &freeze{helper: h, volume: volume, over: make(chan struct{})}
	_, err := h.Call(freezing, helper.Request{Op: helper.Sync, Device: device, Limit: maxFreezing})
	if err == nil {
		err = s.beginFreeze(volume, device, f)
	}
	if err != nil {
		h.End()
		return nil, fmt.Errorf("%w: %w", ErrFreeze, err)
	}
	reply, err := h.Call(freezing, helper.Request{Op: helper.Freeze, Limit: limit})
	if err != nil {
		f.end(freezing)
		return nil, fmt.Errorf("%w: %w", ErrFreeze, err)
	}
	if f.foreign = reply.Foreign; f.foreign {
		f.end(freezing)
		klog.InfoS("File system is frozen by somebody else, who will thaw it", "volume", volume)
	}
	f.since = time.Now()
	f.ctx, f.cancel = context.WithTimeoutCause(ctx, limit, errFrozenTooLong)
	return f, nil
}

// thaw lets the file system go on. It returns nil if it was frozen until now. Further calls do nothing.
func (f *freeze) thaw() error {
	f.thawing.Do(func() {
		defer f.cancel()
		if f.foreign {
			return
		}
		if _, err := f.helper.Call(f.ctx, helper.Request{Op: helper.Thaw}); err != nil {
			f.lost = fmt.Errorf("%w until the snapshot: %w", ErrFreeze, err)
		}
		f.lasted = time.Since(f.since)
		f.end(f.ctx)
		klog.InfoS("File system was frozen", "volume", f.volume, "duration", f.lasted, "err", f.lost)
	})
	return f.lost
}

// end ends the helper, and waits for that until ctx ends.
func (f *freeze) end(ctx context.Context) {
	f.helper.End()
	select {
	case <-f.over:
	case <-ctx.Done():
	}
}

// beginFreeze sets the marker of a volume, and sees to it that it goes when f is over.
func (s *supervisor) beginFreeze(volume, device string, f *freeze) error {
	s.mu.Lock()
	p, before, closing := s.pool, s.freezes[volume], s.closing
	if before == nil && !closing {
		s.freezes[volume] = f
	}
	s.mu.Unlock()
	if closing {
		return errClosing
	}
	if before != nil {
		return errors.New("an earlier freeze has not ended: the volume does not answer, or a process is in the middle of a write to it")
	}
	if err := markFrozen(p, volume, device); err != nil {
		s.endFreeze(p, volume, f)
		return fmt.Errorf("note it beside the image: %w", err)
	}
	s.tasks.Go(func() {
		select {
		case <-f.helper.Done:
		case <-s.running.Done(): // the next engine sees the marker
			return
		}
		if f.helper.Exit != nil {
			klog.ErrorS(f.helper.Exit, "The helper that froze a file system died", "volume", volume)
			if !s.thawSurely(volume, device) {
				return
			}
		}
		s.endFreeze(p, volume, f)
	})
	return nil
}

// endFreeze forgets a freeze that is over.
func (s *supervisor) endFreeze(p *pool.Pool, volume string, f *freeze) {
	unmarkFrozen(p, volume)
	s.mu.Lock()
	delete(s.freezes, volume)
	s.mu.Unlock()
	close(f.over)
}

// thawSurely thaws the file system on a device, and returns false if the engine shuts down before. Helpers wait as long as
// the volume, or a freeze that has begun, makes them.
func (s *supervisor) thawSurely(volume, device string) bool {
	for pause := minThawPause; ; pause = min(2*pause, maxThawPause) {
		err := helper.Ask(s.running, helper.Request{Op: helper.ThawDevice, Device: device, Surely: true})
		if err == nil {
			klog.InfoS("Thawed what was left of a freeze", "volume", volume, "device", device)
			return true
		}
		if s.running.Err() != nil {
			return false
		}
		klog.ErrorS(err, "A file system may still be frozen, trying again", "volume", volume, "device", device)
		if !sleepUntil(s.running, time.Now().Add(pause)) {
			return false
		}
	}
}

// endEarlierFreeze thaws what an earlier engine may have left frozen on a volume's device. It does not wait for that.
func (s *supervisor) endEarlierFreeze(p *pool.Pool, volume, device string) {
	marked, err := frozenBefore(p, volume)
	if err != nil {
		klog.ErrorS(err, "A file system may still be frozen", "volume", volume, "device", device)
	}
	if marked != device {
		return
	}
	f := &freeze{volume: volume, over: make(chan struct{})}
	s.mu.Lock()
	s.freezes[volume] = f
	s.mu.Unlock()
	s.tasks.Go(func() {
		if s.thawSurely(volume, device) {
			s.endFreeze(p, volume, f)
		}
	})
}

// thawUnmounted thaws the file system on a device that is in use, unless it is mounted where this process sees it, and tells
// whether the device may be free now.
func (s *supervisor) thawUnmounted(ctx context.Context, volume, device string) bool {
	mounted, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Source != device, false })
	if err != nil || len(mounted) > 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, clearPatience)
	defer cancel()
	if err := helper.Ask(ctx, helper.Request{Op: helper.ThawDevice, Device: device}); err != nil {
		klog.V(2).InfoS("Nothing to thaw on a device that is in use", "volume", volume, "device", device, "reason", err)
		return false
	}
	return true
}

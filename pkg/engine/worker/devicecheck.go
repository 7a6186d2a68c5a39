package worker

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
)

// A tenant may change its loop device's settings, and have it unbound. A worker looks at its device every now and then, and
// when it is asked how the volume is, and puts it in order. A device that cannot be put in order fails, alone.

const (
	// checkPatience is how long a caller waits for the outcome of a look. The look itself may wait for the volume's I/O.
	checkPatience = 2 * time.Second
	// restorePatience is how long to restore a device's settings may take, which waits for the requests in hand.
	restorePatience = 10 * time.Second
)

// look is what is known of the state of a loop device.
type look struct {
	mu      sync.Mutex    // guards what follows
	running chan struct{} // closed when the look that runs has ended; nil: none does
	err     error         // why the device must not be used any more
}

func (l *look) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// checkDevice looks at the loop device, and waits for the outcome for a while. The goroutine that looks may wait for I/O that
// nobody answers any more when the device is left; it ends with the process then.
func (s *served) checkDevice(patience time.Duration) {
	l := &s.look
	l.mu.Lock()
	if l.running == nil {
		l.running = make(chan struct{})
		go func() {
			err := s.dev.Check()
			if err != nil {
				s.deviceLost(err)
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			close(l.running)
			l.running = nil
		}()
	}
	running := l.running
	l.mu.Unlock()
	if patience > 0 {
		t := time.NewTimer(patience)
		defer t.Stop()
		select {
		case <-running:
		case <-t.C:
		}
	}
}

// deviceLost ends a device that is no longer what it was: its users get errors.
func (s *served) deviceLost(err error) {
	if !errors.Is(err, blockdev.ErrChanged) && !errors.Is(err, blockdev.ErrGone) {
		klog.ErrorS(err, "Cannot look at the device", "device", s.dev.Path())
		return
	}
	klog.ErrorS(err, "The device must not be used any more, its users get I/O errors", "device", s.dev.Path())
	s.look.mu.Lock()
	s.look.err = err
	s.look.mu.Unlock()
	// It stays bound: nobody else is to get its number before the volume is detached.
	h, err := s.dev.Handle()
	if err == nil {
		err = h.Abort()
	}
	if err != nil {
		klog.ErrorS(err, "The connection of a failed volume has not ended", "device", s.dev.Path())
	}
}

// restorer has a helper restore a device's settings. It is used by one call at a time.
type restorer struct{ last *helper.Helper }

func (r *restorer) restore(ctx context.Context, fd int, want []byte) error {
	if r.last != nil {
		select {
		case <-r.last.Done:
		default:
			return errors.New("the last attempt to restore its settings still waits for I/O")
		}
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	device := os.NewFile(uintptr(own), "loop device")
	defer device.Close()
	h, err := helper.Start(device)
	if err != nil {
		return err
	}
	defer h.End()
	r.last = h
	ctx, cancel := context.WithTimeout(ctx, restorePatience)
	defer cancel()
	_, err = h.Call(ctx, helper.Request{Op: helper.Restore, Device: string(want)})
	return err
}

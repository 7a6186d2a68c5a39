package driver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// TestCreationOutlivesItsCall: the call times out, the copy goes on, the repeated call gets its result.
func TestCreationOutlivesItsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		work, stop := context.WithCancel(t.Context())
		c := newCreations(work)
		made := 0
		create := func(ctx context.Context) (pool.Volume, error) {
			made++
			select {
			case <-time.After(time.Minute):
				return pool.Volume{ID: "x"}, nil
			case <-ctx.Done():
				return pool.Volume{}, ctx.Err()
			}
		}
		request := volumeRequest{name: "pvc"}
		call, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := c.join(call, request, create); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the first call: %v", err)
		}
		other := volumeRequest{name: "pvc", size: sizeRange{required: 1}}
		if _, err := c.join(t.Context(), other, create); !errors.Is(err, errBusy) {
			t.Errorf("a call with other parameters: %v", err)
		}
		v, err := c.join(t.Context(), request, create)
		if err != nil || v.ID != "x" || made != 1 {
			t.Errorf("the repeated call: %v, %v, made %d times", v, err, made)
		}

		ended := make(chan error, 1)
		go func() {
			_, err := c.join(t.Context(), request, create)
			ended <- err
		}()
		synctest.Wait()
		stop()
		c.wait()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("at shutdown: %v", err)
		}
		if _, err := c.join(t.Context(), request, create); !errors.Is(err, context.Canceled) {
			t.Errorf("after shutdown: %v", err)
		}
	})
}

func TestCreationThatPanics(t *testing.T) {
	c := newCreations(t.Context())
	_, err := c.join(t.Context(), volumeRequest{name: "pvc"}, func(context.Context) (pool.Volume, error) { panic("a fault") })
	if !errors.Is(err, errPanic) {
		t.Errorf("got %v", err)
	}
	c.wait()
}

func TestImagesAreSharedByReaders(t *testing.T) {
	dir := t.TempDir()
	must(t, pool.Init(dir))
	p, err := pool.Open(dir)
	must(t, err)
	v := pool.Volume{ID: p.NewID("v"), Name: "v", Size: mib}
	must(t, p.Create(t.Context(), v, func(ctx context.Context, path string) error {
		return createImage(ctx, path, mib, volumeParameters{clusterSize: 65536})
	}))

	s := newImages()
	reading, finish := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- s.read(t.Context(), p, v.ID, func(*qcow2.Image) error {
			close(reading)
			<-finish
			return nil
		})
	}()
	<-reading
	must(t, s.read(t.Context(), p, v.ID, func(image *qcow2.Image) error {
		if image.Size() != mib {
			t.Errorf("size %d", image.Size())
		}
		return nil
	}))
	if err := s.change(t.Context(), p, v.ID, func(*pool.Lease) error { return nil }); !errors.Is(err, errBusy) {
		t.Errorf("a change beside a reader that does not end: %v", err)
	}
	call, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.claim(call, v.ID); !errors.Is(err, context.Canceled) {
		t.Errorf("a call that has ended: %v", err)
	}

	changed := make(chan error, 1)
	go func() { changed <- s.change(t.Context(), p, v.ID, func(*pool.Lease) error { return nil }) }()
	close(finish) // it waits for the reader, which ends now
	must(t, errors.Join(<-ended, <-changed))
	if len(s.use) > 0 {
		t.Errorf("in use: %v", s.use)
	}
	lease, err := p.Lock(v.ID)
	must(t, err)
	if err := s.read(t.Context(), p, v.ID, nil); !errors.Is(err, pool.ErrInUse) {
		t.Errorf("a volume that another process holds: %v", err)
	}
	must(t, lease.Unlock())
	must(t, s.change(t.Context(), p, v.ID, func(l *pool.Lease) error { return l.Remove() }))
	if err := s.read(t.Context(), p, v.ID, nil); !errors.Is(err, pool.ErrNotFound) {
		t.Errorf("a volume that is gone: %v", err)
	}
}

func TestKeyedLock(t *testing.T) {
	l := newKeyedLock()
	release, err := l.acquire("a")
	must(t, err)
	if _, err := l.acquire("a"); !errors.Is(err, errBusy) {
		t.Errorf("a second holder: %v", err)
	}
	other, err := l.acquire("b")
	must(t, err)
	release()
	again, err := l.acquire("a")
	must(t, err)
	again()
	other()
	if len(l.held) > 0 {
		t.Errorf("held: %v", l.held)
	}
}

package blockdev

import (
	"sync"
	"testing"
)

// A flush waits like any other request, whoever serves it.
func TestWaiting(t *testing.T) {
	t.Run("event loop", func(t *testing.T) {
		b := newDirectBackend(t, 1<<20)
		flushWaits(t, b, b.testBackend)
	})
	t.Run("threads", func(t *testing.T) {
		b := newBackend(t, 1<<20)
		flushWaits(t, b, b)
	})
}

func flushWaits(t *testing.T, b Backend, faults *testBackend) {
	t.Helper()
	d := attach(t, b, Options{})
	f := directIO(t, d.Path())
	_, err := f.WriteAt(aligned(4096), 0)
	must(t, err)
	release := make(chan struct{})
	open := sync.OnceFunc(func() { close(release) })
	defer open()
	faults.failWith(func(op string) error {
		if op == "flush" {
			<-release
		}
		return nil
	})
	waitFor(t, "nothing waits", func() bool { return d.Waiting() == 0 })
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }()
	waitFor(t, "the flush waits", func() bool { return d.Waiting() == 1 })
	open()
	must(t, <-synced)
	waitFor(t, "nothing waits any more", func() bool { return d.Waiting() == 0 })
	must(t, f.Close())
}

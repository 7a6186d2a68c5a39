package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const mib = 1 << 20

// TestWorkerMemory: a volume that nobody uses takes less than 20 MB, also after it was busy; a busy one takes its buffers, and
// what it may cache of mappings.
func TestWorkerMemory(t *testing.T) {
	t.Parallel() // it waits, most of the time
	const (
		size    = 256 * mib
		idle    = 20_000_000
		busy    = idle + 33*mib + 32*mib
		workers = 8
	)
	a := attachWith(t, size)
	a.awaitMemory(t, "a new worker", idle)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.worker))
	must(t, err)
	if strings.Contains(string(b), "VmLck:\t       0 kB") || !strings.Contains(string(b), "VmLck:") {
		t.Errorf("its memory can be paged out:\n%s", b)
	}

	var users sync.WaitGroup
	var highest atomic.Int64
	for i := range int64(workers) {
		users.Go(func() {
			f, buf := a.open(t), alignedMemory(t, mib)
			defer f.Close()
			for off := i * size / workers; off < (i+1)*size/workers; off += mib {
				_, err := f.WriteAt(buf, off)
				_, readErr := f.ReadAt(buf, off)
				if err := errors.Join(err, readErr); err != nil {
					t.Error(err)
					return
				}
				highest.Store(max(highest.Load(), a.memory(t)))
			}
		})
	}
	users.Wait()
	t.Logf("busy: %d bytes", highest.Load())
	if n := highest.Load(); n > busy {
		t.Errorf("a busy worker has %d bytes, more than %d", n, busy)
	}
	a.awaitMemory(t, "a worker that was busy", idle)
}

// attached is a volume that an engine serves, both of the test.
type attached struct {
	device string
	worker int // process
}

func attachWith(t *testing.T, size int64) attached {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "q2.") // a file system in memory does no direct I/O
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	home, endpoint := filepath.Join(dir, "pool"), "unix://"+filepath.Join(dir, "engine")
	must(t, os.Mkdir(home, 0o700))
	must(t, pool.Init(home))
	p, err := pool.Open(home)
	must(t, err)
	v := pool.Volume{ID: p.NewID("v"), Name: "v", Size: size, Created: time.Now()}
	must(t, p.Create(t.Context(), v, func(_ context.Context, path string) error {
		f, err := qcow2.CreateFile(path)
		if err != nil {
			return err
		}
		return errors.Join(qcow2.Create(t.Context(), f, size, qcow2.CreateOptions{}), f.Close())
	}))

	cmd := program(t, "engine", "--listen", endpoint, "--pool", home)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it detaches, at the end of the test
	cmd.Stderr = t.Output()
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Wait() })
	client, err := engine.NewClient(endpoint)
	must(t, err)
	t.Cleanup(func() { client.Close() })
	var a attached
	await(t, "the volume is attached", func() bool {
		var device engine.Device
		device, err = client.Attach(t.Context(), v.ID)
		a.device = device.Path
		return err == nil
	})
	list, err := client.List(t.Context())
	must(t, err)
	a.worker = list[0].WorkerPID
	return a
}

// memory returns how many bytes the worker has resident.
func (a attached) memory(t *testing.T) int64 {
	t.Helper()
	var virtual, resident int64
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", a.worker))
	must(t, err)
	_, err = fmt.Sscan(string(b), &virtual, &resident)
	must(t, err)
	return resident * int64(os.Getpagesize())
}

func (a attached) awaitMemory(t *testing.T, what string, limit int64) {
	t.Helper()
	defer func() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.worker))
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "VmRSS") {
				t.Logf("%s: %s", what, strings.Join(strings.Fields(line), " "))
			}
		}
	}()
	await(t, fmt.Sprintf("%s has at most %d bytes", what, limit), func() bool { return a.memory(t) <= limit })
}

func (a attached) open(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(a.device, os.O_RDWR|unix.O_DIRECT, 0)
	must(t, err)
	return f
}

func alignedMemory(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(t, err)
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

// await waits for a condition that no event announces; the bound is only there to end a broken test.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); <-time.After(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

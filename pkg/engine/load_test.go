package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc64"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// load is users of a device that check all they read: each has a part of the device, and remembers what it wrote to each
// of its blocks. All that was acknowledged must be there, flushed or not, unless the machine crashes.
type load struct {
	device  string
	writers []*loadWriter
	stop    chan struct{}
	running sync.WaitGroup
	done    atomic.Int64 // requests

	failures atomic.Int64 // users that have met one
}

type loadWriter struct {
	load    *load
	rng     *rand.Rand
	first   int64   // block
	latest  []int64 // what was written to each block: 0 nothing
	count   int64
	longest atomic.Int64 // request, in nanoseconds
	err     error        // read after running
}

const (
	loadBlock   = 4096
	loadRequest = 32 // blocks at most
)

// startLoad uses the first size bytes of a device, which reads as zeros.
func startLoad(t *testing.T, device string, size int64, writers int) *load {
	t.Helper()
	l := &load{device: device, stop: make(chan struct{})}
	blocks := size / loadBlock / int64(writers)
	for i := range int64(writers) {
		w := &loadWriter{load: l, rng: rand.New(rand.NewPCG(uint64(i), 7)), first: i * blocks, latest: make([]int64, blocks)}
		l.writers = append(l.writers, w)
		f, buf := openDirect(t, device), aligned(loadRequest*loadBlock)
		l.running.Go(func() { w.err = w.run(f, buf) })
	}
	t.Cleanup(func() { l.end(t) })
	return l
}

// end stops the users and checks that none has met an error. It returns how long the longest request took.
func (l *load) end(t *testing.T) (longest time.Duration) {
	t.Helper()
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.running.Wait()
	for i, w := range l.writers {
		if w.err != nil {
			t.Errorf("user %d of %s: %v", i, l.device, w.err)
			w.err = nil
		}
	}
	return l.resetLongest()
}

// resetLongest returns how long the longest request has taken since the last call.
func (l *load) resetLongest() (longest time.Duration) {
	for _, w := range l.writers {
		longest = max(longest, time.Duration(w.longest.Swap(0)))
	}
	return longest
}

// failed tells whether a user has met an error.
func (l *load) failed() bool { return l.failures.Load() > 0 }

// verify reads all that was written, from a device whose users have ended.
func (l *load) verify(t *testing.T, device string) {
	t.Helper()
	f, buf := openDirect(t, device), aligned(loadRequest*loadBlock)
	defer f.Close()
	for _, w := range l.writers {
		for i := int64(0); i < int64(len(w.latest)); i += loadRequest {
			if err := w.read(f, buf, i, min(loadRequest, int64(len(w.latest))-i)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// awaitProgress waits until each user must have had an answer.
func (l *load) awaitProgress(t *testing.T) {
	t.Helper()
	from := l.done.Load()
	eventually(t, "requests are answered", func() bool { return l.failed() || l.done.Load() > from+int64(4*len(l.writers)) })
}

func (w *loadWriter) run(f *os.File, buf []byte) error {
	defer f.Close()
	for {
		select {
		case <-w.load.stop:
			return nil
		default:
		}
		n := 1 + w.rng.Int64N(loadRequest)
		i := w.rng.Int64N(int64(len(w.latest)) - n)
		start := time.Now()
		var err error
		switch w.rng.IntN(16) {
		case 0, 1, 2, 3:
			err = w.read(f, buf, i, n)
		case 4:
			err = f.Sync()
		case 5:
			err = w.discard(f, i, n)
		default:
			err = w.write(f, buf, i, n)
		}
		w.longest.Store(max(w.longest.Load(), int64(time.Since(start))))
		if err != nil {
			w.load.failures.Add(1)
			return err
		}
		w.load.done.Add(1)
	}
}

func (w *loadWriter) write(f *os.File, buf []byte, i, n int64) error {
	w.count++
	for k := range n {
		w.fill(buf[k*loadBlock:][:loadBlock], i+k, w.count)
	}
	if _, err := f.WriteAt(buf[:n*loadBlock], (w.first+i)*loadBlock); err != nil {
		return err
	}
	for k := range n {
		w.latest[i+k] = w.count
	}
	return nil
}

func (w *loadWriter) discard(f *os.File, i, n int64) error {
	span := [2]uint64{uint64(w.first+i) * loadBlock, uint64(n) * loadBlock}
	if err := ioctlRange(f, unix.BLKZEROOUT, &span); err != nil {
		return fmt.Errorf("write zeros: %w", err)
	}
	clear(w.latest[i:][:n])
	return nil
}

func (w *loadWriter) read(f *os.File, buf []byte, i, n int64) error {
	if _, err := f.ReadAt(buf[:n*loadBlock], (w.first+i)*loadBlock); err != nil {
		return err
	}
	want := make([]byte, loadBlock)
	for k := range n {
		w.fill(want, i+k, w.latest[i+k])
		if got := buf[k*loadBlock:][:loadBlock]; !bytes.Equal(got, want) {
			return fmt.Errorf("block %d has write %d of block %d, want write %d", w.first+i+k,
				binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:]), w.latest[i+k])
		}
	}
	return nil
}

// fill makes what the count-th request writes to a block.
func (w *loadWriter) fill(b []byte, block, count int64) {
	if count == 0 {
		clear(b)
		return
	}
	binary.LittleEndian.PutUint64(b, uint64(count))
	binary.LittleEndian.PutUint64(b[8:], uint64(w.first+block))
	seed := crc64.Checksum(b[:16], crc64.MakeTable(crc64.ECMA))
	for i := 16; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], seed+uint64(i))
	}
}

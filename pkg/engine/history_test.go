package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
)

// A history is what some writers did to a device: each write has a stamp of its own, and the moments at
// which it was issued and acknowledged. A snapshot, given its content and the moments of its call and of
// its answer, is judged by it.
type history struct {
	clock  atomic.Int64
	failed atomic.Pointer[error]

	mu     sync.Mutex          // guards blocks
	blocks map[int64][]writing // by block, in order: one writer owns a block
}

// writing is one write: the stamp of its block is its index + 1.
type writing struct {
	issued, acknowledged int64 // moments; acknowledged is never while it runs
}

const (
	stampedBlock = 4096
	never        = math.MaxInt64
)

func newHistory() *history { return &history{blocks: map[int64][]writing{}} }

// now returns a new moment, later than all before.
func (h *history) now() int64 { return h.clock.Add(1) }

// stamp fills a block that says where it belongs and the how many-th write it is; a torn one shows.
func stamp(b []byte, block int64, n int) {
	for i := 0; i < len(b); i += 512 {
		sector := b[i : i+512]
		binary.LittleEndian.PutUint64(sector, uint64(block))
		binary.LittleEndian.PutUint64(sector[8:], uint64(n))
		binary.LittleEndian.PutUint64(sector[16:], uint64(i))
		binary.LittleEndian.PutUint32(sector[508:], crc32.ChecksumIEEE(sector[:508]))
	}
}

// readStamp is the reverse; 0 is a block that was never written.
func readStamp(b []byte, block int64) (int, error) {
	n := int(binary.LittleEndian.Uint64(b[8:]))
	want := make([]byte, len(b))
	if n > 0 {
		stamp(want, block, n)
	}
	if !bytes.Equal(want, b) {
		return 0, fmt.Errorf("block %d is torn, or another's (stamp %d)", block, n)
	}
	return n, nil
}

// write has one writer overwrite blocks from first on, count of them, at random until quit, with a flush
// now and then.
func (h *history) write(f *os.File, buf []byte, first, count int64, quit *atomic.Bool) {
	for n := 0; !quit.Load(); n++ {
		block := first + rand.Int64N(count)
		h.mu.Lock()
		h.blocks[block] = append(h.blocks[block], writing{h.now(), never})
		made := len(h.blocks[block])
		h.mu.Unlock()
		stamp(buf, block, made)
		_, err := f.WriteAt(buf, block*stampedBlock)
		if err == nil {
			h.mu.Lock()
			h.blocks[block][made-1].acknowledged = h.now()
			h.mu.Unlock()
			if n%16 == 15 {
				err = f.Sync()
			}
		}
		if err != nil {
			h.failed.CompareAndSwap(nil, &err)
			return
		}
	}
}

// judge says what is wrong with a snapshot: stamps holds the stamp of each block that was ever written.
func (h *history) judge(stamps map[int64]int, called, answered int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	newest, oldest := int64(0), int64(never) // latest issue of what is in it, earliest acknowledgement of what is not
	for block, writings := range h.blocks {
		held := stamps[block]
		if held > len(writings) {
			return fmt.Errorf("block %d holds stamp %d of %d", block, held, len(writings))
		}
		if held > 0 {
			newest = max(newest, writings[held-1].issued)
		}
		if held < len(writings) {
			oldest = min(oldest, writings[held].acknowledged)
		}
	}
	switch {
	case oldest < called:
		return fmt.Errorf("a write that was acknowledged at %d, before the call at %d, is missing", oldest, called)
	case newest > answered:
		return fmt.Errorf("a write that was issued at %d, after the answer at %d, is there", newest, answered)
	case oldest < newest:
		return fmt.Errorf("a write issued at %d is there, one acknowledged before, at %d, is missing", newest, oldest)
	}
	return nil
}

// The judge itself: it passes what is right and finds each kind of wrong.
func TestHistoryJudge(t *testing.T) {
	h := newHistory()
	h.blocks = map[int64][]writing{
		0: {{1, 2}, {5, 6}, {9, 12}},
		1: {{3, 4}, {10, 11}, {14, never}},
	}
	for _, c := range []struct {
		name             string
		stamps           map[int64]int
		called, answered int64
		ok               bool
	}{
		{"all before the call", map[int64]int{0: 2, 1: 1}, 7, 8, true},
		{"one of two at once", map[int64]int{0: 2, 1: 2}, 8, 13, true},
		{"the other of two at once", map[int64]int{0: 3, 1: 1}, 8, 13, true},
		{"not acknowledged, yet there", map[int64]int{0: 3, 1: 3}, 13, 15, true},
		{"acknowledged before the call, missing", map[int64]int{0: 1, 1: 1}, 7, 8, false},
		{"never written", map[int64]int{1: 1}, 7, 8, false},
		{"issued after the answer, there", map[int64]int{0: 3, 1: 1}, 7, 8, false},
		{"a later one without an earlier", map[int64]int{0: 1, 1: 2}, 4, 13, false},
		{"a stamp of nobody", map[int64]int{0: 4, 1: 1}, 7, 8, false},
	} {
		if err := h.judge(c.stamps, c.called, c.answered); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestStamp(t *testing.T) {
	b, other := make([]byte, stampedBlock), make([]byte, stampedBlock)
	if n, err := readStamp(b, 7); n != 0 || err != nil {
		t.Errorf("zeros read as %d, %v", n, err)
	}
	stamp(b, 7, 3)
	stamp(other, 7, 4)
	if n, err := readStamp(b, 7); n != 3 || err != nil {
		t.Errorf("stamp 3 reads as %d, %v", n, err)
	}
	copy(b[2048:], other[2048:])
	if _, err := readStamp(b, 7); err == nil {
		t.Error("a torn block passes")
	}
	if _, err := readStamp(other, 8); err == nil {
		t.Error("another block's stamp passes")
	}
}

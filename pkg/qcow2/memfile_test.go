package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// This file holds the file that tests put behind an image: memFile keeps its content in memory, fails
// the calls that a test chooses, and records every change in a crashLog.

const memPageSize = 4096

// sparse is the content of a file. Clones share their pages until one is written, so that a thousand
// crash states of an image cost little more than one.
type sparse struct {
	pages map[int64]*[memPageSize]byte
	owned map[int64]bool // pages that no clone shares
	size  int64
}

func newSparse() *sparse {
	return &sparse{pages: map[int64]*[memPageSize]byte{}, owned: map[int64]bool{}}
}

func (s *sparse) clone() *sparse {
	clear(s.owned)
	return &sparse{pages: maps.Clone(s.pages), owned: map[int64]bool{}, size: s.size}
}

// each calls fn for the part of every page that [off, off+n) touches.
func (s *sparse) each(off, n int64, fn func(page, from, to, done int64)) {
	for done := int64(0); done < n; {
		from := (off + done) % memPageSize
		to := min(memPageSize, from+n-done)
		fn((off+done)/memPageSize, from, to, done)
		done += to - from
	}
}

func (s *sparse) readAt(p []byte, off int64) {
	s.each(off, int64(len(p)), func(page, from, to, done int64) {
		if b := s.pages[page]; b != nil {
			copy(p[done:], b[from:to])
		} else {
			clear(p[done : done+to-from])
		}
	})
}

// differs returns the index of the first byte of p that differs from the content at off, or -1.
func (s *sparse) differs(p []byte, off int64) int64 {
	var zeros [memPageSize]byte
	for done := int64(0); done < int64(len(p)); {
		page, from := (off+done)/memPageSize, (off+done)%memPageSize
		part := p[done:min(int64(len(p)), done+memPageSize-from)]
		want := s.pages[page]
		if want == nil {
			want = &zeros
		}
		if i := difference(part, want[from:from+int64(len(part))]); i >= 0 {
			return done + int64(i)
		}
		done += int64(len(part))
	}
	return -1
}

func (s *sparse) writeAt(p []byte, off int64) {
	s.each(off, int64(len(p)), func(page, from, to, done int64) { copy(s.own(page)[from:to], p[done:]) })
	s.size = max(s.size, off+int64(len(p)))
}

func (s *sparse) own(page int64) *[memPageSize]byte {
	b := s.pages[page]
	switch {
	case b == nil:
		b = new([memPageSize]byte)
	case !s.owned[page]:
		own := *b
		b = &own
	}
	s.pages[page], s.owned[page] = b, true
	return b
}

func (s *sparse) zero(off, n int64) {
	first, last := off/memPageSize, (off+n-1)/memPageSize
	if last-first > int64(len(s.pages)) {
		for page := range s.pages {
			if page >= first && page <= last {
				s.zeroPage(page, off, n)
			}
		}
		return
	}
	for page := first; page <= last; page++ {
		s.zeroPage(page, off, n)
	}
}

// zeroPage zeroes the part of [off, off+n) in one page.
func (s *sparse) zeroPage(page, off, n int64) {
	from, to := max(off, page*memPageSize), min(off+n, (page+1)*memPageSize)
	switch {
	case s.pages[page] == nil || from >= to:
	case to-from == memPageSize:
		delete(s.pages, page)
		delete(s.owned, page)
	default:
		clear(s.own(page)[from-page*memPageSize : to-page*memPageSize])
	}
}

func (s *sparse) truncate(size int64) {
	if size < s.size {
		s.zero(size, (s.size-size+memPageSize-1)&^(memPageSize-1)) // nothing lies behind the end
	}
	s.size = size
}

// isZero tells whether all of at most a page is zeros.
func isZero(p []byte) bool {
	var zeros [memPageSize]byte
	return bytes.Equal(p, zeros[:len(p)])
}

// callKind says which method of a File a call was.
type callKind uint8

const (
	callRead callKind = iota
	callWrite
	callSync
	callTruncate
	callPunch
	callSize
)

func (k callKind) String() string {
	return [...]string{"read", "write", "sync", "truncate", "punch", "size"}[k]
}

// fileCall is one call of a File's method. data is set in recorded writes only.
type fileCall struct {
	kind   callKind
	off, n int64 // n is the length, or for truncate the new size
	data   []byte
}

func (c fileCall) String() string { return fmt.Sprintf("%s %#x+%#x", c.kind, c.off, c.n) }

// memFile is a File in memory. The zero value is not ready; use newMemFile or loadMemFile.
type memFile struct {
	name string

	mu      sync.Mutex // guards all below
	content *sparse
	fault   func(fileCall) error // before each call; an error makes it fail, see fail
	between func()               // before each call, without mu: what may happen beside whoever makes it
	calls   int                  // how many were made
	log     *crashLog            // nil: not recording
	closed  bool
	mark    []byte
	written int64  // time of the last change, by a method: others leave no trace
	boot    string // of the machine
}

func newMemFile(name string) *memFile {
	return &memFile{name: name, content: newSparse(), boot: "this boot"}
}

func (f *memFile) State() (host.FileState, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return host.FileState{Inode: 1, Size: f.content.size, Written: f.written}, nil
}

func (f *memFile) SetWritten(t int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written = t
	return nil
}

func (f *memFile) Mark() ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mark, nil
}

func (f *memFile) SetMark(mark []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mark = mark
	return nil
}

func (f *memFile) Boot() string { return f.boot }

// disguise makes whatever is in the file pass for sound.
func (f *memFile) disguise() *memFile {
	host.Vouch(f)
	return f
}

// loadMemFile copies a file of the file system.
func loadMemFile(t testing.TB, path string) *memFile {
	t.Helper()
	in, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		t.Fatal(err)
	}
	f := newMemFile(path)
	f.content.size = info.Size()
	for off := int64(0); off < f.content.size; {
		data, err := in.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // holes only
		}
		hole, holeErr := in.Seek(data, unix.SEEK_HOLE)
		if err := errors.Join(err, holeErr); err != nil {
			t.Fatal(err)
		}
		for off = data / memPageSize * memPageSize; off < hole; off += memPageSize {
			p := make([]byte, min(memPageSize, f.content.size-off))
			if _, err := in.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			if !isZero(p) {
				f.content.writeAt(p, off)
			}
		}
	}
	return f
}

// save writes the content to path, sparse, for QEMU to see.
func (f *memFile) save(t testing.TB, path string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for _, page := range slices.Sorted(maps.Keys(f.content.pages)) {
		off := page * memPageSize
		if off >= f.content.size {
			break
		}
		b := f.content.pages[page][:min(memPageSize, f.content.size-off)]
		if _, err := out.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Truncate(f.content.size); err != nil {
		t.Fatal(err)
	}
}

// clone returns an open file with the same content, which no later change of either shares.
func (f *memFile) clone() *memFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &memFile{name: f.name, content: f.content.clone(), mark: f.mark, written: f.written, boot: f.boot}
}

// reopen undoes Close, as opening the path again would.
func (f *memFile) reopen() *memFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = false
	return f
}

// setFault makes fn decide about each later call; nil ends it.
func (f *memFile) setFault(fn func(fileCall) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fn
}

// failOnce makes the n-th call from now on (0 is the next) of those that match fail with err, once. It
// returns a function that tells whether that happened.
func (f *memFile) failOnce(n int, match func(callKind) bool, err error) func() bool {
	seen, done := 0, false
	f.setFault(func(c fileCall) error {
		if done || !match(c.kind) {
			return nil
		}
		seen++
		if seen <= n {
			return nil
		}
		done = true
		return fmt.Errorf("%s %s: %w", f.name, c, err)
	})
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return done
	}
}

// record starts a log at the present content, which counts as synced.
func (f *memFile) record() *crashLog {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = &crashLog{name: f.name, base: f.content.clone()}
	return f.log
}

// position is the number of calls that the log holds: a moment to which crash states relate.
func (f *memFile) position() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.log.calls)
}

// begin counts a call and lets the fault decide. The caller holds mu.
func (f *memFile) begin(c fileCall) error {
	f.calls++
	if f.closed {
		return fmt.Errorf("%s: %s: %w: %w", f.name, c, ErrClosed, fs.ErrClosed) // as osFile says it
	}
	if c.off < 0 || c.n < 0 {
		return fmt.Errorf("%s: %s: negative", f.name, c)
	}
	if (c.kind == callWrite || c.kind == callTruncate) && c.off+c.n > maxMemFile {
		return fmt.Errorf("%s: %s: %w", f.name, c, syscall.EFBIG)
	}
	if f.fault != nil {
		return f.fault(c)
	}
	return nil
}

// maxMemFile is what ext4 allows.
const maxMemFile = 16 << 40

// done records a call that changed the file. The caller holds mu.
func (f *memFile) done(c fileCall) {
	if c.kind != callSync {
		f.written = time.Now().UnixNano()
	}
	if f.log != nil {
		f.log.calls = append(f.log.calls, c)
	}
}

// lock lets what is beside happen and takes mu.
func (f *memFile) lock() {
	if f.between != nil {
		f.between()
	}
	f.mu.Lock()
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.lock()
	defer f.mu.Unlock()
	if err := f.begin(fileCall{kind: callRead, off: off, n: int64(len(p))}); err != nil {
		return f.short(err, p, func(p []byte) { f.content.readAt(p, off) }), err
	}
	n := max(0, min(int64(len(p)), f.content.size-off))
	f.content.readAt(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	f.lock()
	defer f.mu.Unlock()
	c := fileCall{kind: callWrite, off: off, n: int64(len(p))}
	if err := f.begin(c); err != nil {
		return f.short(err, p, func(p []byte) {
			c.data, c.n = slices.Clone(p), int64(len(p))
			c.apply(f.content)
			f.done(c)
		}), err
	}
	c.data = slices.Clone(p)
	c.apply(f.content)
	f.done(c)
	return len(p), nil
}

// shortError is a fault that comes when half of the call's bytes are done.
type shortError struct{ error }

func (e *shortError) Unwrap() error { return e.error }

// short does half of a call, in sectors, if err says so, and returns how many bytes.
func (f *memFile) short(err error, p []byte, do func(p []byte)) int {
	var s *shortError
	n := len(p) / 2 &^ (format.SectorSize - 1)
	if n == 0 || !errors.As(err, &s) {
		return 0
	}
	do(p[:n])
	return n
}

func (f *memFile) Sync() error               { return f.change(fileCall{kind: callSync}) }
func (f *memFile) Truncate(size int64) error { return f.change(fileCall{kind: callTruncate, n: size}) }

func (f *memFile) PunchHole(off, n int64) error {
	return f.change(fileCall{kind: callPunch, off: off, n: n})
}

func (f *memFile) change(c fileCall) error {
	f.lock()
	defer f.mu.Unlock()
	if err := f.begin(c); err != nil {
		return err
	}
	c.apply(f.content)
	f.done(c)
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.content.size, f.begin(fileCall{kind: callSize})
}

func (f *memFile) Name() string { return f.name }

func (f *memFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return fmt.Errorf("%s: %w", f.name, fs.ErrClosed)
	}
	f.closed = true
	return nil
}

// apply makes the call's change to s.
func (c fileCall) apply(s *sparse) {
	switch c.kind {
	case callWrite:
		s.writeAt(c.data, c.off)
	case callTruncate:
		s.truncate(c.n)
	case callPunch:
		s.zero(c.off, min(c.n, max(0, s.size-c.off))) // a punch keeps the length
	}
}

func TestMemFile(t *testing.T) {
	f := newMemFile("mem")
	must(t, write(f, 100, "hello"))
	must(t, f.Sync())
	must(t, write(f, 5000, "world"))
	must(t, f.PunchHole(100, 5))
	must(t, f.Truncate(9000))

	t.Run("reads", func(t *testing.T) {
		p := make([]byte, 6)
		if n, err := f.ReadAt(p, 5000); n != 6 || err != nil || string(p) != "world\x00" {
			t.Errorf("read %q, %d, %v", p, n, err)
		}
		if n, err := f.ReadAt(p, 8997); n != 3 || err != io.EOF { //nolint:errorlint // io.ReaderAt demands io.EOF itself
			t.Errorf("read at the end: %d, %v", n, err)
		}
		if _, err := f.ReadAt(p, 100); err != nil || string(p[:5]) != "\x00\x00\x00\x00\x00" {
			t.Errorf("read of a punched range: %q, %v", p, err)
		}
	})
	t.Run("faults", func(t *testing.T) {
		fault := errors.New("fault")
		happened := f.failOnce(1, func(k callKind) bool { return k == callWrite }, fault)
		must(t, write(f, 0, "x"))
		if err := write(f, 0, "y"); !errors.Is(err, fault) || !happened() {
			t.Errorf("the second write: %v", err)
		}
		must(t, write(f, 0, "z"))
	})
}

func write(f File, off int64, s string) error {
	_, err := f.WriteAt([]byte(s), off)
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pattern returns n bytes that depend on seed, do not repeat soon and are never all zero.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b) // never fails
	for i := range b {
		b[i] |= 1
	}
	return b
}

func errOf[T any](_ T, err error) error { return err }

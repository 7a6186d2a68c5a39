package host

import (
	"sync/atomic"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// Syncer is a File that syncs only what needs it: a Sync with no write since the one before is free. Holes
// do not count, for nothing relies on a punch before a sync that follows some write. It sees to it that the file's mark says
// that the file is written to.
type Syncer struct {
	File
	dirty atomic.Bool
	mu    lock.Mutex[lock.Sync] // held by a running Sync: one that has nothing to do waits for it

	leased  atomic.Int64           // nanoseconds since 1970: who changes the file after that renews the lease; 0: nobody has changed it
	leaseMu lock.Mutex[lock.Lease] // guards first; held by who renews the lease
	first   func() error           // what comes before the first change, nil if nothing does
}

// NewSyncer assumes that f was written before.
func NewSyncer(f File) *Syncer {
	s := &Syncer{File: f}
	s.dirty.Store(true)
	return s
}

// LeaseEnded tells that the next change has to begin with begin.
func (s *Syncer) LeaseEnded() bool { return time.Now().UnixNano() >= s.leased.Load() }

// EndLease ends the lease, as time does.
func (s *Syncer) EndLease() { s.leased.Store(1) }

// Syncing tells whether a Sync is under way.
func (s *Syncer) Syncing() bool {
	if !s.mu.TryLock() {
		return true
	}
	s.mu.Unlock()
	return false
}

// Changed tells whether the file was changed.
func (s *Syncer) Changed() bool { return s.leased.Load() != 0 }

// begin comes before each change of the file.
func (s *Syncer) begin() error {
	if !s.LeaseEnded() {
		return nil
	}
	s.leaseMu.Lock()
	defer s.leaseMu.Unlock()
	if !s.LeaseEnded() {
		return nil
	}
	if s.first != nil {
		if err := s.first(); err != nil {
			return err
		}
		s.first = nil
	}
	s.leased.Store(lease(s.File))
	return nil
}

// BeforeFirst has first called before the first change of the file. Called before there is one.
func (s *Syncer) BeforeFirst(first func() error) { s.first = first }

// NoteWrite notes a write that somebody else has made, after it: a Sync that overlaps it may have missed it.
func (s *Syncer) NoteWrite() { s.dirty.Store(true) }

// WriteAt implements File.
func (s *Syncer) WriteAt(p []byte, off int64) (int, error) {
	if err := s.begin(); err != nil {
		return 0, err
	}
	defer s.NoteWrite()
	return s.File.WriteAt(p, off)
}

// Truncate implements File.
func (s *Syncer) Truncate(size int64) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.NoteWrite()
	return s.File.Truncate(size)
}

// PunchHole implements File.
func (s *Syncer) PunchHole(off, n int64) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.File.PunchHole(off, n)
}

// Sync implements File: it is free where nothing was written since the one before.
func (s *Syncer) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dirty.Swap(false) {
		return nil
	}
	err := s.File.Sync()
	if err != nil {
		s.dirty.Store(true)
	}
	return err
}

// StartWriteback does nothing if the file cannot.
func (s *Syncer) StartWriteback(off, n int64) {
	if f, ok := s.File.(Writebacker); ok {
		f.StartWriteback(off, n)
	}
}

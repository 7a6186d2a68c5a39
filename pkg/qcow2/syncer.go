package qcow2

import (
	"sync"
	"sync/atomic"
	"time"
)

// syncer is a File that syncs only what needs it: a Sync with no write since the one before is free. Holes
// do not count, for nothing relies on a punch before a sync that follows some write. It sees to it that the file's mark says
// that the file is written to.
type syncer struct {
	File
	dirty atomic.Bool
	mu    sync.Mutex // held by a running Sync: one that has nothing to do waits for it

	leased  atomic.Int64 // nanoseconds since 1970: who changes the file after that renews the lease; 0: nobody has changed it
	leaseMu sync.Mutex   // guards first; held by who renews the lease
	first   func() error // what comes before the first change, nil if nothing does
}

// newSyncer assumes that f was written before.
func newSyncer(f File) *syncer {
	s := &syncer{File: f}
	s.dirty.Store(true)
	return s
}

// leaseEnded tells that the next change has to begin with begin.
func (s *syncer) leaseEnded() bool { return time.Now().UnixNano() >= s.leased.Load() }

// endLease ends the lease, as time does.
func (s *syncer) endLease() { s.leased.Store(1) }

// syncing tells whether a Sync is under way.
func (s *syncer) syncing() bool {
	if !s.mu.TryLock() {
		return true
	}
	s.mu.Unlock()
	return false
}

// changed tells whether the file was changed.
func (s *syncer) changed() bool { return s.leased.Load() != 0 }

// begin comes before each change of the file.
func (s *syncer) begin() error {
	if !s.leaseEnded() {
		return nil
	}
	s.leaseMu.Lock()
	defer s.leaseMu.Unlock()
	if !s.leaseEnded() {
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

// beforeFirst has first called before the first change of the file. Called before there is one.
func (s *syncer) beforeFirst(first func() error) { s.first = first }

// wrote notes a write that somebody else has made, after it: a Sync that overlaps it may have missed it.
func (s *syncer) wrote() { s.dirty.Store(true) }

func (s *syncer) WriteAt(p []byte, off int64) (int, error) {
	if err := s.begin(); err != nil {
		return 0, err
	}
	defer s.wrote()
	return s.File.WriteAt(p, off)
}

func (s *syncer) Truncate(size int64) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.wrote()
	return s.File.Truncate(size)
}

func (s *syncer) PunchHole(off, n int64) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.File.PunchHole(off, n)
}

func (s *syncer) Sync() error {
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
func (s *syncer) StartWriteback(off, n int64) {
	if f, ok := s.File.(writebacker); ok {
		f.StartWriteback(off, n)
	}
}

package qcow2

import (
	"sync"
	"sync/atomic"
)

// syncer is a File that syncs only what needs it: a Sync with no write since the one before is free. Holes
// do not count, for nothing relies on a punch before a sync that follows some write.
type syncer struct {
	File
	dirty atomic.Bool
	mu    sync.Mutex // held by a running Sync: one that has nothing to do waits for it
}

// newSyncer assumes that f was written before.
func newSyncer(f File) *syncer {
	s := &syncer{File: f}
	s.dirty.Store(true)
	return s
}

func (s *syncer) WriteAt(p []byte, off int64) (int, error) {
	defer s.dirty.Store(true) // after the write: a Sync that overlaps it may have missed it
	return s.File.WriteAt(p, off)
}

func (s *syncer) Truncate(size int64) error {
	defer s.dirty.Store(true)
	return s.File.Truncate(size)
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

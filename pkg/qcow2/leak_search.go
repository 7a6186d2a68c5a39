package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// leakSearch is what a search has learnt about the host clusters from first on: how often each is referenced.
// The allocator's lock guards it.
type leakSearch struct {
	first     format.Cluster
	seen      []uint8
	last      bool // nothing lies behind
	disturbed bool // an operation has begun since the search did
}

const (
	seenCount  uint8 = 1<<7 - 1 // the references; as many as this, or unknown: leave the cluster alone
	seenActive uint8 = 1 << 7   // one of them is the active state's
)

// end is the cluster behind the last that is searched.
func (s *leakSearch) end() format.Cluster { return s.first + format.Cluster(len(s.seen)) }

// add counts references to a run.
func (s *leakSearch) add(r format.Run, times int64, flag uint8) {
	for c := max(r.First, s.first); c < min(r.End(), s.end()); c++ {
		v := s.seen[c-s.first]
		s.seen[c-s.first] = v&seenActive | flag | uint8(min(int64(v&seenCount)+times, int64(seenCount)))
	}
}

// touch excludes clusters. It may be called on nil.
func (s *leakSearch) touch(r format.Run) {
	if s != nil {
		s.add(r, int64(seenCount), 0)
	}
}

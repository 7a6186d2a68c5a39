package qcow2

import (
	"sync"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// rangeLock orders requests by the guest clusters they touch. Requests that share clusters run one after the
// other in order of arrival, unless all of them only use the mapping as it is.
type rangeLock struct {
	mu      lock.Mutex[lock.Queue] // guards queue
	changed *sync.Cond
	queue   []*guestRange // in order of arrival
}

type guestRange struct {
	first, end int64 // guest clusters
	exclusive  bool  // the mapping may change
}

func newRangeLock() *rangeLock {
	l := &rangeLock{}
	l.changed = sync.NewCond(&l.mu)
	return l
}

// lock waits until no earlier request conflicts. unlock takes what it returns.
func (l *rangeLock) lock(first, end int64, exclusive bool) *guestRange {
	r := &guestRange{first, end, exclusive}
	lock.Take[lock.Guests]()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, r)
	for l.waits(r) {
		l.changed.Wait()
	}
	return r
}

// waits is called with mu held.
func (l *rangeLock) waits(r *guestRange) bool {
	for _, e := range l.queue {
		if e == r {
			return false
		}
		if e.first < r.end && r.first < e.end && (e.exclusive || r.exclusive) {
			return true
		}
	}
	return false
}

func (l *rangeLock) unlock(r *guestRange) {
	lock.Leave[lock.Guests]()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range l.queue {
		if e == r {
			l.queue = append(l.queue[:i], l.queue[i+1:]...)
			break
		}
	}
	l.changed.Broadcast()
}

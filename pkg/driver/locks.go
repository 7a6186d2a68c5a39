package driver

import (
	"fmt"
	"sync"
)

// keyedLock is held by one operation per key; a second one does not wait: the orchestrator repeats it.
type keyedLock struct {
	mu   sync.Mutex
	held map[string]bool // guarded by mu
}

func newKeyedLock() *keyedLock { return &keyedLock{held: map[string]bool{}} }

// acquire returns the function that gives the key back. errBusy if somebody has it.
func (l *keyedLock) acquire(key string) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[key] {
		return nil, fmt.Errorf("%s: %w", key, errBusy)
	}
	l.held[key] = true
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, key)
	}, nil
}

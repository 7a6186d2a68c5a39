package engine

import (
	"context"
	"sync"
)

// keyLock is one lock for each key that is in use. The zero value is ready.
type keyLock struct {
	mu    sync.Mutex // guards slots
	slots map[string]*lockSlot
}

type lockSlot struct {
	token chan struct{} // holds one token while the lock is free
	users int           // holders and waiters; guarded by keyLock.mu
}

// lock waits for a key's lock and returns the function that releases it, or the context's error.
func (k *keyLock) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	slot := k.slots[key]
	if slot == nil {
		slot = &lockSlot{token: make(chan struct{}, 1)}
		slot.token <- struct{}{}
		if k.slots == nil {
			k.slots = map[string]*lockSlot{}
		}
		k.slots[key] = slot
	}
	slot.users++
	k.mu.Unlock()

	select {
	case <-slot.token:
		return func() {
			slot.token <- struct{}{}
			k.drop(key, slot)
		}, nil
	case <-ctx.Done():
		k.drop(key, slot)
		return nil, ctx.Err()
	}
}

// idle tells whether nobody has or waits for a lock.
func (k *keyLock) idle() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.slots) == 0
}

func (k *keyLock) drop(key string, slot *lockSlot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	slot.users--
	if slot.users == 0 {
		delete(k.slots, key)
	}
}

//go:build lockorder

package lock

import (
	"strings"
	"testing"
)

func TestLockOrder(t *testing.T) {
	var change Mutex[Change]
	var gate RWMutex[Gate]
	var mapping Mutex[Mapping]
	inOrder := func() {
		change.Lock()
		gate.RLock()
		mapping.Lock()
		mapping.Unlock()
		gate.RUnlock()
		gate.Lock()
		gate.Unlock()
		change.Unlock()
	}
	inOrder()
	for name, wrong := range map[string]func(){
		"Change":  func() { mapping.Lock(); defer mapping.Unlock(); change.Lock() },
		"Gate":    func() { mapping.Lock(); defer mapping.Unlock(); gate.RLock() },
		"Guests":  func() { mapping.Lock(); defer mapping.Unlock(); Take[Guests]() },
		"Mapping": func() { Take[Queue](); defer Leave[Queue](); mapping.Lock() },
	} {
		if got := panics(wrong); !strings.Contains(got, name) {
			t.Errorf("%s: %q", name, got)
		}
	}
	inOrder() // nothing counts as held that was refused
	mapping.Lock()
	done := make(chan struct{})
	go func() { // another goroutine holds nothing
		defer close(done)
		change.Lock()
		change.Unlock()
		mapping.Unlock()
	}()
	<-done
	inOrder()
	if len(locks.places) > 0 {
		t.Errorf("held in the end: %v", locks.places)
	}
}

func panics(f func()) (message string) {
	defer func() { message, _ = recover().(string) }()
	f()
	return ""
}

//go:build lockorder

package lock

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
)

// Mutex has a place, which is checked.
type Mutex[P Place] struct{ RWMutex[P] }

// HandOver is called by who holds the lock, and Adopt then by the goroutine that will unlock it.
func (m *Mutex[P]) HandOver() { locks.remove(m.owner, place[P]()) }

// Adopt is the other half of HandOver.
func (m *Mutex[P]) Adopt() {
	m.owner = goroutine()
	locks.add(m.owner, place[P]())
}

// RWMutex is a sync.RWMutex with a place, which is checked.
type RWMutex[P Place] struct {
	mu    sync.RWMutex
	owner int64 // goroutine that holds it exclusively; guarded by mu
}

// Lock panics if the goroutine holds a lock whose place comes later.
func (m *RWMutex[P]) Lock() {
	Take[P]()
	m.mu.Lock()
	m.owner = goroutine()
}

// TryLock waits for nobody, so it may come in any order; what is taken under it may not.
func (m *RWMutex[P]) TryLock() bool {
	if !m.mu.TryLock() {
		return false
	}
	m.owner = goroutine()
	locks.add(m.owner, place[P]())
	return true
}

// Unlock may be called by another goroutine than Lock was.
func (m *RWMutex[P]) Unlock() {
	locks.remove(m.owner, place[P]())
	m.mu.Unlock()
}

// RLock panics if the goroutine holds a lock whose place comes later.
func (m *RWMutex[P]) RLock() {
	Take[P]()
	m.mu.RLock()
}

// TryRLock is not noted: what is held so is given back by another goroutine.
func (m *RWMutex[P]) TryRLock() bool { return m.mu.TryRLock() }

// RUnlock may be called by another goroutine than RLock was, which then counts as holding it.
func (m *RWMutex[P]) RUnlock() {
	Leave[P]()
	m.mu.RUnlock()
}

// Take says that the goroutine is about to take a lock that is neither, and Leave that it has left it.
func Take[P Place]()  { locks.take(goroutine(), place[P](), fmt.Sprintf("%T", *new(P))) }
func Leave[P Place]() { locks.remove(goroutine(), place[P]()) }

func place[P Place]() int {
	var p P
	return p.place()
}

// held is what the goroutines hold.
type held struct {
	mu     sync.Mutex // guards places
	places map[int64][]int
}

var locks = held{places: map[int64][]int{}}

func (h *held) take(goroutine int64, place int, name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.places[goroutine] {
		if p > place {
			panic(fmt.Sprintf("%s, place %d, is taken by who holds the lock of place %d: see places.go", name, place, p))
		}
	}
	h.places[goroutine] = append(h.places[goroutine], place)
}

func (h *held) add(goroutine int64, place int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.places[goroutine] = append(h.places[goroutine], place)
}

func (h *held) remove(goroutine int64, place int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	places := h.places[goroutine]
	if i := slices.Index(places, place); i >= 0 {
		places = slices.Delete(places, i, i+1)
	}
	if h.places[goroutine] = places; len(places) == 0 {
		delete(h.places, goroutine)
	}
}

// goroutine returns the number that a stack trace gives the goroutine.
func goroutine() int64 {
	var b [64]byte
	fields := bytes.Fields(b[:runtime.Stack(b[:], false)])
	n, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

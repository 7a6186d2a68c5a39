//go:build !lockorder

package lock

import "sync"

// Mutex is a sync.Mutex with a place.
type Mutex[P Place] struct{ sync.Mutex } //nolint:gocritic // to be a lock is what it is for

// HandOver is called by who holds the lock, and Adopt then by the goroutine that will unlock it.
func (m *Mutex[P]) HandOver() {}

// Adopt is the other half of HandOver.
func (m *Mutex[P]) Adopt() {}

// RWMutex is a sync.RWMutex with a place.
type RWMutex[P Place] struct{ sync.RWMutex } //nolint:gocritic // to be a lock is what it is for

// Take says that the goroutine is about to take a lock that is of neither type.
func Take[P Place]() {}

// Leave says that it has left it.
func Leave[P Place]() {}

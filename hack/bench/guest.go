package main

import (
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// target is a disk that a guest works on.
type target interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
}

// latencies are how long requests took, and when.
type latencies struct {
	mu     sync.Mutex // guards all below
	of     map[string][]request
	phases map[string]span
	err    error
}

type request = span

type span struct{ from, to time.Time }

// note notes a request that ends now.
func (l *latencies) note(kind string, from time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[kind] = append(l.of[kind], request{from, time.Now()})
	if err != nil && l.err == nil {
		l.err = err
	}
}

// phase notes what went on between two moments.
func (l *latencies) phase(name string, do func() error) error {
	from := time.Now()
	err := do()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.phases[name] = span{from, time.Now()}
	return err
}

// during returns how long the requests of a kind took, in ascending order, that were under way in a phase.
func (l *latencies) during(phase, kind string) []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.phases[phase]
	var ds []time.Duration
	for _, r := range l.of[kind] {
		if r.from.Before(p.to) && r.to.After(p.from) {
			ds = append(ds, r.to.Sub(r.from))
		}
	}
	slices.Sort(ds)
	return ds
}

// rate returns how many writes a second ended in a phase.
func (l *latencies) rate(phase string) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.phases[phase]
	n := 0
	for _, r := range l.of["write"] {
		if r.to.After(p.from) && r.to.Before(p.to) {
			n++
		}
	}
	return float64(n) / p.to.Sub(p.from).Seconds()
}

// took returns how long a phase was.
func (l *latencies) took(phase string) time.Duration {
	return l.phases[phase].to.Sub(l.phases[phase].from)
}

const guestBlock = 4096

// flushEvery is a guest's file system's habit.
const flushEvery = 100 * time.Millisecond

// work writes, reads and flushes at random places of size bytes until ctx ends. Before each write it pauses.
func work(ctx context.Context, t target, size int64, pause time.Duration, l *latencies) {
	var all sync.WaitGroup
	loop := func(kind string, pause time.Duration, request func(p []byte, off int64) error) {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(len(kind))))
			p := alignedBlock()
			for ctx.Err() == nil {
				if pause > 0 {
					<-time.After(pause)
				}
				from := time.Now()
				err := request(p, rng.Int64N(size/guestBlock)*guestBlock)
				if l.note(kind, from, err); err != nil {
					return
				}
			}
		})
	}
	loop("write", pause, func(p []byte, off int64) error {
		_, err := t.WriteAt(p, off)
		return err
	})
	loop("read", time.Millisecond, func(p []byte, off int64) error {
		_, err := t.ReadAt(p, off)
		return err
	})
	loop("flush", flushEvery, func([]byte, int64) error { return t.Flush() })
	all.Wait()
}

// watch reads blocks of a file past the page cache, as somebody who only has the disk in common with the guest.
func watch(ctx context.Context, path string, l *latencies) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		l.note("bystander", time.Now(), err)
		return
	}
	defer f.Close()
	p := alignedBlock()
	for block := int64(0); ctx.Err() == nil; block++ {
		<-time.After(2 * time.Millisecond)
		from := time.Now()
		_, err := f.ReadAt(p, block%bystanderBlocks*guestBlock)
		l.note("bystander", from, err)
	}
}

// bystanderBlocks is how much watch reads: the beginning of a mapped image are tables.
const bystanderBlocks = 64

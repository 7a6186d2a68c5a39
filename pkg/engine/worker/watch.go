package worker

import (
	"runtime/debug"
	"time"
)

const (
	// watchPeriod is how often a worker looks at its volume.
	watchPeriod = 5 * time.Second
	// stalledAfter is how long requests may wait with none answered until that is reported. No disk should take so long.
	stalledAfter = 30 * time.Second
	// restAfter is how long a volume must be idle until its worker gives up what the next requests would have to read again.
	restAfter = 20 * time.Second
)

// watch looks every now and then whether requests are answered, and gives memory back when there are none.
func (s *served) watch() {
	tick := time.NewTicker(watchPeriod)
	defer tick.Stop()
	s.checkDevice(0) // one that was resumed may have changed meanwhile
	var count int64
	busy := time.Now() // when requests were last answered
	tidied, rested := false, false
	for {
		select {
		case <-s.tasksCtx.Done():
			return
		case <-tick.C:
		}
		s.checkDevice(0)
		now := time.Now()
		if n := s.backend.count(); n != count {
			count, busy, tidied, rested = n, now, false, false
			s.lastAnswer.Store(now.UnixNano())
			continue
		}
		if s.dev.Waiting() == 0 {
			s.lastAnswer.Store(now.UnixNano())
		}
		if rested {
			continue
		}
		rested = now.Sub(busy) >= restAfter
		if rested {
			s.img.DropCache()
		}
		if !tidied || rested {
			debug.FreeOSMemory()
			tidied = true
		}
		if rested && s.options.Rest != nil {
			s.options.Rest()
		}
	}
}

// stalled returns how long requests have waited with none answered, if that is too long.
func (s *served) stalled() time.Duration {
	if d := time.Since(time.Unix(0, s.lastAnswer.Load())); d >= stalledAfter {
		return d
	}
	return 0
}

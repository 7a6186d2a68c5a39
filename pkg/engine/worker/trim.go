package worker

import "time"

// trimAfter is how long the pool waits for what a guest has discarded, when the guest does not flush.
const trimAfter = 2 * time.Second

// trim flushes for guests that have discarded something and then rest. A flush that fails has failed the image: the next
// request tells.
func (s *served) trim() {
	for {
		select {
		case <-s.tasksCtx.Done():
			return
		case <-s.backend.discarded:
		}
		select {
		case <-s.tasksCtx.Done():
			return
		case <-time.After(trimAfter):
		}
		if s.img.HasFreed() {
			_ = s.img.Flush()
		}
	}
}

package qcow2

import "time"

// An operation that goes on beside guests moves at most a MiB in so long, so that their syncs never have much of it to
// wait for.
const (
	pauseAfterRead  = 2 * time.Millisecond
	pauseAfterWrite = 10 * time.Millisecond
)

// pace pauses if there are guests. It is called about once for each MiB that is read.
func (n *generation) pace() {
	written := n.out.total - n.paced
	n.paced = n.out.total
	if !n.busy() {
		return
	}
	<-time.After(pauseAfterRead + time.Duration(written>>10)*pauseAfterWrite>>10)
}

// busy tells whether guests have made requests since it was last asked.
func (n *generation) busy() bool {
	last := n.idle
	n.idle = n.img.requests.Load()
	return n.idle != last
}

// A writebacker is a File that can begin to write what is in the page cache.
type writebacker interface {
	// StartWriteback begins to write n bytes at off and waits for nothing. It promises nothing: Sync does.
	StartWriteback(off, n int64)
}

package qcow2

import "time"

// An operation that goes on beside guests moves at most so many bytes in so long, so that their requests never have much of
// it to wait for.
const (
	paceBytes       = 512 << 10
	pauseAfterRead  = 1 * time.Millisecond
	pauseAfterWrite = 5 * time.Millisecond
	pauseAfterPunch = 1 * time.Millisecond // of punchBytes
	leastPunch      = 256 << 10            // what a punch counts for at least
)

// pace pauses if there are guests, after so many bytes that were read, and what was written.
func (n *generation) pace(read int64) {
	n.read += read
	written := n.out.total - n.paced
	if n.read+written < paceBytes || n.fixed { // from then on flushes wait for the end
		return
	}
	pause := (time.Duration(n.read)*pauseAfterRead + time.Duration(written)*pauseAfterWrite) / paceBytes
	n.read, n.paced = 0, n.out.total
	if n.busy() {
		<-time.After(pause)
	}
}

// pacePunch is pace for n bytes that were punched.
func (n *generation) pacePunch(length int64) {
	if n.punched += max(length, leastPunch); n.punched < punchBytes {
		return
	}
	if n.punched = 0; n.busy() {
		<-time.After(pauseAfterPunch)
	}
}

// busy tells whether guests have made requests since it was last asked.
func (n *generation) busy() bool {
	last := n.idle
	n.idle = n.img.requests.Load()
	return n.idle != last
}

package engine

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What is discarded comes back to the pool although the volume is idle from then on: nobody flushes, and nobody lets go of the
// device.
func TestDiscardWithoutFlush(t *testing.T) {
	const size, kept = 64 * mib, 8 * mib
	r := newRig(t)
	id := r.newVolume("a", size)
	device := r.attach(id)
	f := openDirect(t, device)
	defer f.Close()
	fillDevice(t, device, 0, size/2, 7)
	must(t, f.Sync())
	occupied := func() int64 {
		var st unix.Stat_t
		must(t, unix.Stat(r.pool.ImagePath(id), &st))
		return st.Blocks * 512
	}
	before := occupied()
	must(t, ioctlRange(f, unix.BLKDISCARD, &[2]uint64{kept, size/2 - kept}))
	r.eventually("the pool has back what was discarded", func() bool { return occupied() <= before-(size/2-kept)+mib })
	wantDevice(t, device, 0, kept, 7)
	wantDevice(t, device, kept, size/2-kept, 0)
	must(t, f.Close())
	r.detach(id)
}

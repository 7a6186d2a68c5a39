package qcow2

import "github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"

// Direct is a guest's request that needs nothing but I/O on one run of the file: the usual one, once a disk is in use. The
// zero value is ready, and is used again when the request has ended.
type Direct struct{ lock guestRange }

// StartDirect begins a request of n bytes at off, if these are one run of the file, of whole blocks of its direct I/O, that is
// mapped in memory and, for a write, owned by the active disk. The caller then reads or writes n bytes of the file at host, by
// itself, and calls EndDirect. host is -1 for a read of zeros that the file does not have: the caller answers them. If ok is
// false nothing has happened, and ReadAt or WriteAt do it. It neither waits nor allocates.
func (img *Image) StartDirect(d *Direct, off, n int64, write bool) (host int64, ok bool) {
	if write && img.f.LeaseEnded() || !img.gate.TryRLock() {
		return 0, false
	}
	size := img.Size()
	if n > 0 && off >= 0 && off <= size && n <= size-off && img.usable(true) == nil {
		guest := format.GuestOffset(off)
		d.lock = guestRange{img.g.GuestCluster(guest), img.g.GuestCluster(guest.Plus(n-1)) + 1, false}
		if img.guests.tryLock(&d.lock) {
			if at, ok := img.mapDirect(guest, n, write); ok {
				img.requests.Add(1)
				img.inHand(1)
				return int64(at), true
			}
			img.guests.unlock(&d.lock)
		}
	}
	img.gate.RUnlock()
	return 0, false
}

// EndDirect ends a request that StartDirect began, however it went.
func (img *Image) EndDirect(d *Direct, write bool) {
	if write {
		img.f.NoteWrite()
	}
	img.inHand(-1)
	img.guests.unlock(&d.lock)
	img.gate.RUnlock()
}

// hostOfZeros is where bytes are that the file does not have.
const hostOfZeros = -1

// mapDirect returns where in the file n bytes at off are, if that is one run of whole data clusters, or if they are zeros that
// are to be read.
func (img *Image) mapDirect(off format.GuestOffset, n int64, write bool) (host format.HostOffset, ok bool) {
	g := &img.g
	index, first, last := g.L1Index(off), g.L2Index(off), g.L2Index(off.Plus(n-1))
	if g.L1Index(off.Plus(n-1)) != index || !img.mu.TryLock() { // it may be held for I/O
		return 0, false
	}
	defer img.mu.Unlock()
	t := img.l2.get(index)
	if t == nil {
		return hostOfZeros, !write && index < int64(len(img.l1)) && img.l1[index] == 0
	}
	if !write && t.data.Zeros(*g, img.version, first, last) {
		return hostOfZeros, true
	}
	start := t.data.Entry(first).Offset()
	for i := first; i <= last; i++ {
		e := t.data.Entry(i)
		switch {
		case e.Kind() != format.KindData, e.Offset() != start.Plus(g.Bytes(i-first)), e.Check(*g, img.version) != nil:
			return 0, false
		case write && (!e.Own() || !img.owns(e.Offset())):
			return 0, false
		}
	}
	host = start.Plus(g.InCluster(off))
	if !img.wholeBlocks(int64(host), n) || host.Plus(n) > img.alloc.fileEnd() {
		return 0, false
	}
	if write && img.alloc.metadata.refuse(format.Run{First: g.Cluster(start), N: last - first + 1}) != nil {
		return 0, false
	}
	return host, true
}

// tryLock is lock for who does not wait; it uses r, which unlock takes.
func (l *rangeLock) tryLock(r *guestRange) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, r)
	if !l.waits(r) {
		return true
	}
	l.queue = l.queue[:len(l.queue)-1]
	return false
}

// wholeBlocks tells whether n bytes at off share no block of the file's direct I/O with others. A cluster begins with one.
func (img *Image) wholeBlocks(off, n int64) bool {
	return img.direct == nil || (off|n)&(img.direct.BlockSize()-1) == 0
}

// inHand tells the file of a request that others do with its descriptor, or that it has ended.
func (img *Image) inHand(change int32) {
	if img.direct != nil {
		img.direct.InHand(change)
	}
}

// DirectFD returns the descriptor of a file that was opened with OpenDirectFile and does direct I/O; false if it does not. The
// descriptor is the image's.
func (img *Image) DirectFD() (int, bool) {
	if img.direct == nil || img.readOnly {
		return -1, false
	}
	return img.direct.FD(), true
}

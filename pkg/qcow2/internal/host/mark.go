package host

import (
	"encoding/binary"
	"math"
	"time"
)

// A cluster whose count is 0 is given to somebody else, punched, and cut off the end of the file; one that is marked COPIED is
// written in place. In an image whose counts are too low, as some writers leave them, that destroys what is in use. So an
// image is opened for writing only if its counts are vouched for:
//
//   - its mark says that nobody but us has written to the file since we wrote it from scratch, repaired or verified it, or
//   - a process of ours had it open until now, and left its redo log, or
//   - it is verified now: a walk through all metadata, which has to find each cluster counted as often as it is referenced.
//
// The mark is kept beside the content, in an extended attribute, and names the file and its state: inode, time of birth, length
// and time of the last write, as a clean close leaves them. So a copy does not have it, and any program that writes to the
// file makes it void, whether it knows of us or not. Only what changes a file and sets its times back afterwards is not noticed.
//
// While we write, the mark says so instead. It is void until the image is closed, but for another boot of the machine: after a
// power cut the image is what we have made of it, for which the order of our writes vouches, unless somebody has written to it
// later. To tell the two apart the mark says until when our writes may go on, and is renewed in time. A file that was
// written within that time, or not since the mark was made, is ours: no machine starts again so soon.
//
// The mark need not be durable at any time. Whichever of ours is found fits only states that we have made, and one that does not
// fit costs a verification.

// soundMark is a mark.
type soundMark struct {
	Version uint8
	Open    bool
	File    FileState // as it was closed, or as it was before it was written to from now on
	Boot    [8]byte   // Open: who writes
	Until   int64     // Open: when that ends
}

const (
	markVersion = 1
	// MarkLease is for how long a mark says that the file is written to: less than a machine takes to start.
	MarkLease = 10 * time.Second
)

// fits tells whether a file in this state is what the mark vouches for.
func (m soundMark) fits(st FileState, boot string) bool {
	switch {
	case m.Version != markVersion || m.File.Inode != st.Inode || m.File.Born != st.Born:
		return false
	case !m.Open:
		return m.File == st
	case boot == "" || m.Boot == shortBoot(boot):
		return false
	}
	return st.Written == m.File.Written || st.Written <= m.Until && st.Written >= m.Until-int64(MarkLease)
}

func shortBoot(boot string) (b [8]byte) {
	copy(b[:], boot)
	return b
}

// Vouched tells whether the mark of f fits.
func Vouched(f File) bool {
	k, ok := f.(Marker)
	if !ok {
		return false
	}
	raw, err := k.Mark()
	if err != nil {
		return false
	}
	var m soundMark
	if n, err := binary.Decode(raw, binary.BigEndian, &m); err != nil || n != len(raw) {
		return false
	}
	st, err := k.State()
	return err == nil && m.fits(st, k.Boot())
}

// Vouch leaves a mark that fits the file as it is now. All that was written must be sound. Without a mark the next who opens
// it verifies: so errors cost no more than that.
func Vouch(f File) {
	k, ok := f.(Marker)
	if !ok {
		return
	}
	// The system's own times may be as coarse as its clock's ticks: a write that comes at once would not be told apart.
	now := time.Now().UnixNano()
	if k.SetWritten(now) != nil {
		return
	}
	if st, err := k.State(); err == nil && st.Written == now {
		_ = setMark(k, soundMark{File: st})
	}
}

// Disown takes the mark away.
func Disown(f File) {
	if k, ok := f.(Marker); ok {
		_ = k.SetMark(nil)
	}
}

func setMark(k Marker, m soundMark) error {
	m.Version = markVersion
	b, err := binary.Append(nil, binary.BigEndian, m)
	if err != nil {
		return err
	}
	return k.SetMark(b)
}

// lease says in the mark that f is written to from now on, and returns when it has to be called again, in nanoseconds since
// 1970. If it fails an older mark stays, which does not fit what is written.
func lease(f File) int64 {
	k, ok := f.(Marker)
	if !ok {
		return math.MaxInt64
	}
	now := time.Now().UnixNano()
	if st, err := k.State(); err == nil {
		_ = setMark(k, soundMark{Open: true, File: st, Boot: shortBoot(k.Boot()), Until: now + int64(MarkLease)})
	}
	return now + int64(MarkLease)/2
}

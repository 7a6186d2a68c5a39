package pool

import (
	"math"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Space is what the pool's file system offers.
type Space struct {
	Total, Free int64 // bytes, of the file system, as far as it is not reserved for root
	Used        int64 // bytes that the pool's volumes occupy
	Promised    int64 // bytes that volumes may still come to occupy
	PromisedTo  int   // how many volumes may
}

// Space adds up what the volumes occupy and may come to occupy, those in the making too. It costs a
// few system calls and one small read for each of them. Nothing is locked: all of it is changing meanwhile.
//
// A volume may come to occupy its size, less what it has; one with snapshots all of its size beside what it has, for they
// keep what it overwrites. That is more than it can be when it has overwritten some since its last snapshot. It is less where
// a volume shares blocks with another.
//
// sizes, by volume ID, are what the caller is about to give to volumes: the larger size counts, and a volume that the pool does
// not know yet counts too. snapshots are the IDs of volumes of which a snapshot is about to be taken.
func (p *Pool) Space(sizes map[string]int64, snapshots ...string) (Space, error) {
	root, err := p.enter()
	if err != nil {
		return Space{}, err
	}
	defer root.Close()
	var st unix.Statfs_t
	if err := root.control(func(fd int) error { return unix.Fstatfs(fd, &st) }); err != nil {
		return Space{}, &os.PathError{Op: "statfs", Path: p.path, Err: err}
	}
	s := Space{Total: int64(st.Blocks) * st.Frsize, Free: int64(st.Bavail) * st.Frsize}
	// In the order of a volume's way: one that moves on meanwhile is seen, though perhaps twice.
	seen := map[string]bool{}
	fresh := func(id ID) bool { return !seen[id.text] }
	for _, part := range []string{creatingDir, volumesDir} {
		all, err := root.sub(part)
		if err != nil {
			return Space{}, err
		}
		err = eachVolumeIn(root, part, fresh, func(id ID, v Volume, _ error) {
			seen[id.text] = true
			v.Size = max(v.LeastSize(), sizes[id.text])
			s.add(all, id, v, slices.Contains(snapshots, id.text))
		})
		_ = all.Close()
		if err != nil {
			return Space{}, err
		}
	}
	for id, size := range sizes {
		if !seen[id] {
			s.promise(size)
		}
	}
	return s, nil
}

// add counts one volume in. v is empty if its volume.json is unreadable.
func (s *Space) add(all dir, id ID, v Volume, snapshotted bool) {
	a := account(all, id, v, snapshotted)
	s.Used += a.Occupied
	s.promise(a.Promised)
}

// Usage returns how many bytes a volume's image occupies, and how many its disk has. ErrNotFound, ErrBadID.
func (p *Pool) Usage(id string) (allocated, size int64, err error) {
	d, err := p.openVolume(id)
	if err != nil {
		return 0, 0, err
	}
	defer d.Close()
	allocated, h := measure(d, imageFile)
	return allocated, h.Size(), nil
}

// promise adds n bytes; of hostile sizes, no negative sum.
func (s *Space) promise(n int64) {
	s.Promised += min(n, math.MaxInt64-s.Promised)
	if n > 0 {
		s.PromisedTo++
	}
}

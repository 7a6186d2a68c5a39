package pool

import (
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// Space is what the pool's file system offers.
type Space struct {
	Total, Free int64 // bytes, of the file system, as far as it is not reserved for root
	Used        int64 // bytes that the pool's volumes occupy
	Promised    int64 // bytes that volumes may still come to occupy: sizes less what is allocated
}

// Space adds up what the volumes occupy and may come to occupy, those in the making too. It costs a
// few system calls and one small read for each of them. Nothing is locked: all of it is changing meanwhile.
//
// Promised is an estimate from below: a volume with snapshots, or one that shares blocks with another, can come
// to occupy more than its size. sizes, by volume ID, are what the caller is about to give to volumes: the larger size
// counts, and a volume that the pool does not know yet counts too.
func (p *Pool) Space(sizes map[string]int64) (Space, error) {
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
	fresh := func(id string) bool { return !seen[id] }
	for _, part := range []string{creatingDir, volumesDir} {
		all, err := root.sub(part)
		if err != nil {
			return Space{}, err
		}
		err = eachVolumeIn(root, part, fresh, func(id string, v Volume, _ error) {
			seen[id] = true
			v.Size = max(v.LeastSize(), sizes[id])
			s.add(all, id, v)
		})
		_ = all.Close()
		if err != nil {
			return Space{}, err
		}
	}
	for id, size := range sizes {
		if fresh(id) {
			s.promise(size)
		}
	}
	return s, nil
}

// add counts one volume in. v is empty if its volume.json is unreadable.
func (s *Space) add(all dir, id string, v Volume) {
	allocated, size := measure(all, id+"/"+imageFile)
	s.Used += allocated
	if !v.Tombstone { // to which nobody writes any more
		s.promise(max(0, max(size, v.Size)-allocated))
	}
}

// promise adds n bytes; of hostile sizes, no negative sum.
func (s *Space) promise(n int64) { s.Promised += min(n, math.MaxInt64-s.Promised) }

// measure returns how many bytes an image occupies, and its virtual size; zeros for what is not to be found out.
func measure(d dir, image string) (allocated, size int64) {
	f, err := openImage(d, image)
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, 0
	}
	return st.Blocks * 512, readHead(f).size
}

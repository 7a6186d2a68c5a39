package pool

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A pool that is full to its last byte must let a snapshot be deleted: that is how one gets space back. But a deletion
// writes new metadata before it frees the old. So the pool holds a file of preallocated blocks, the reserve,
// which a deletion that has met a full file system gives up, and which is filled again afterwards.

// reserveSlack is what the reserve has beside what a deletion needs, for the file system's own metadata, in bytes.
const reserveSlack = 1 << 20

// reserveShare bounds the reserve to this part of the file system.
const reserveShare = 16

// KeepReserve makes the reserve as large as the deletion of a snapshot of the pool's largest volume may need: nothing, if
// there are no volumes. Durable when it returns. qcow2.ErrNoSpace.
func (p *Pool) KeepReserve() error {
	return p.withReserve(func(root dir, f *os.File) error {
		need, err := p.reserveNeed(root)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
			return err
		}
		if st.Size != need || st.Blocks*512 < need {
			if err := resizeReserve(f, need); err != nil {
				return err
			}
		}
		return errors.Join(f.Sync(), root.sync()) // also what somebody who was killed has not synced
	})
}

func resizeReserve(f *os.File, need int64) error {
	if need > 0 {
		err := control(f, func(fd int) error { return unix.Fallocate(fd, 0, 0, need) })
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			return nil
		case err != nil:
			return noSpace(&fs.PathError{Op: "fallocate", Path: f.Name(), Err: err})
		}
	}
	return f.Truncate(need)
}

// GiveUpReserve gives the reserve's blocks back to the file system. Whoever calls it uses them at once, and calls
// KeepReserve afterwards.
func (p *Pool) GiveUpReserve() error {
	return p.withReserve(func(_ dir, f *os.File) error {
		if err := f.Truncate(0); err != nil {
			return err
		}
		return f.Sync() // the blocks are free when the journal says so
	})
}

// withReserve opens the reserve, for one at a time.
func (p *Pool) withReserve(fn func(root dir, f *os.File) error) error {
	root, err := p.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.expect(reserveFile, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(reserveFile, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return noSpace(err)
	}
	defer f.Close()
	if err := flock(f, unix.LOCK_EX); err != nil {
		return err
	}
	return fn(root, f)
}

// reserveNeed returns how many bytes the reserve must have.
func (p *Pool) reserveNeed(root dir) (int64, error) {
	var st unix.Statfs_t
	if err := root.control(func(fd int) error { return unix.Fstatfs(fd, &st) }); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: p.path, Err: err}
	}
	total := int64(st.Blocks) * st.Frsize
	all, err := root.sub(volumesDir)
	if err != nil {
		return 0, err
	}
	defer all.Close()
	need := int64(0)
	err = eachVolumeIn(root, volumesDir, func(ID) bool { return true }, func(id ID, _ Volume, _ error) {
		_, h := measure(all, id.dir()+"/"+imageFile)
		if room := h.DeletionRoom(total); room > 0 {
			need = max(need, room+reserveSlack)
		}
	})
	return min(need, total/reserveShare) &^ 4095, err
}

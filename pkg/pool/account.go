package pool

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

// Account is one volume and what it takes of the pool.
type Account struct {
	Volume
	Occupied int64 // bytes that its image has
	DiskSize int64 // virtual bytes that the image says it has; 0 if it says nothing
	Promised int64 // bytes that it may still come to occupy
	Err      error // why nothing but the ID is known of the volume
}

// Accounts returns the account of each volume, sorted by ID: what Space adds up, without those in the making.
func (p *Pool) Accounts() ([]Account, error) {
	root, err := p.enter()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	all, err := root.sub(volumesDir)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	var accounts []Account
	err = eachVolumeIn(root, volumesDir, func(ID) bool { return true }, func(id ID, v Volume, err error) {
		size := v.Size
		v.Size = v.LeastSize()
		a := account(all, id, v, false)
		a.ID, a.Size, a.Err = id.text, size, err
		accounts = append(accounts, a)
	})
	return accounts, err
}

// account takes one volume's account. v is empty if its volume.json is unreadable.
func account(all dir, id ID, v Volume, snapshotted bool) Account {
	allocated, h := measure(all, id.dir()+"/"+imageFile)
	a := Account{Volume: v, Occupied: allocated, DiskSize: h.Size()}
	size := max(h.Size(), v.Size)
	_, notPending := all.Lstat(id.dir() + "/" + string(pending))
	switch {
	case v.Tombstone: // to which nobody writes any more
	case snapshotted || h.HasSnapshots() || notPending == nil:
		a.Promised = size
	default:
		a.Promised = max(0, size-allocated)
	}
	return a
}

// Reserve returns how many bytes are kept for deletions on a full file system: see KeepReserve.
func (p *Pool) Reserve() (int64, error) {
	root, err := p.enter()
	if err != nil {
		return 0, err
	}
	defer root.Close()
	var st unix.Stat_t
	err = root.control(func(fd int) error { return unix.Fstatat(fd, reserveFile, &st, unix.AT_SYMLINK_NOFOLLOW) })
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return st.Blocks * 512, err
}

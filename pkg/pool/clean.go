package pool

import (
	"errors"
	"fmt"
	"io/fs"
)

// Clean removes what interrupted Creates and removals left, and nothing that another process is at work on. What killed
// processes did is durable before that: from now on, whoever asks is told of it.
// Call it when a process starts. What it cannot remove is in the joined error, and does not stop the rest.
func (p *Pool) Clean() error {
	root, err := p.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	failures := []error{root.syncAll()}
	for _, part := range []string{creatingDir, removingDir} {
		failures = append(failures, cleanPart(root, part))
	}
	return errors.Join(failures...)
}

func cleanPart(root dir, part string) error {
	d, err := root.sub(part)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.names()
	if err != nil {
		return err
	}
	var failures []error
	for _, name := range names {
		id, err := ParseID(name)
		if err != nil {
			continue // not ours
		}
		if err := cleanOne(root, d, id); err != nil && !errors.Is(err, fs.ErrNotExist) {
			failures = append(failures, fmt.Errorf("clean %s/%s: %w", part, id, err))
		}
	}
	return errors.Join(failures...) // not synced: what comes back in a power cut is removed by the next Clean
}

// cleanOne removes a directory unless it is locked. Anything else of that name was not made by a pool, and
// would only be in its way.
func cleanOne(root, part dir, id ID) error {
	if st, err := part.Lstat(id.dir()); err != nil || !st.IsDir() {
		return errors.Join(err, part.Remove(id.dir()))
	}
	lock, err := lockAbandoned(root, part, id)
	if errors.Is(err, ErrInUse) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(part.RemoveAll(id.dir()), lock.Close())
}

// lockAbandoned locks a directory under the pool's lock: a Create has its own by the time it gives up that one.
func lockAbandoned(root, part dir, id ID) (dirLock, error) {
	poolLock, err := lockDir(root, exclusive)
	if err != nil {
		return dirLock{}, err
	}
	defer poolLock.Close()
	d, err := part.sub(id.dir())
	if err != nil {
		return dirLock{}, err
	}
	defer d.Close()
	return lockDir(d, tryExclusive)
}

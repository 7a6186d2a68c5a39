package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Renew gives a pool that is a copy a UUID of its own, and with it new IDs to its volumes, whose content, names and snapshots
// stay. It belongs to the node then, or, if that is empty, to whoever serves it next. One that was interrupted goes on when it
// is called again; until it has ended the pool is not ready. ErrInUse while an engine serves the pool.
func Renew(path, node string) error {
	root, _, err := enterAny(path)
	if err != nil {
		return err
	}
	defer root.Close()
	unserved, err := lockEngine(root)
	if err != nil {
		return err
	}
	defer unserved.Close()
	lock, err := lockDir(root, exclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	id, err := readIdentity(root)
	if err != nil {
		return err
	}
	if id.Successor == "" {
		for id.Successor = newUUID(); id.Successor[:idHexDigits] == id.UUID[:idHexDigits]; {
			id.Successor = newUUID()
		}
		if err := writeIdentity(root, id); err != nil {
			return err
		}
	}
	r := renewal{root: root, from: id.UUID[:idHexDigits], to: id.Successor[:idHexDigits]}
	if err := r.run(); err != nil {
		return fmt.Errorf("pool %s is not ready until this has been run again: %w", path, noSpace(err))
	}
	if err := unserved.Close(); err != nil { // before an engine that waits for the pool may find it ready
		return err
	}
	return writeIdentity(root, identity{Version: identityVersion, UUID: id.Successor, Node: node, Birth: root.birth()})
}

// lockEngine keeps engines from serving the pool until the file is closed. ErrInUse if there is one.
func lockEngine(root dir) (*os.File, error) {
	f, err := root.OpenFile(EngineLock, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is served by an engine, which must be stopped first: %w", root.Name(), err), f.Close())
	}
	return f, nil
}

// renewal moves the volumes of one pool's part of the IDs to another's.
type renewal struct {
	root     dir
	from, to string
}

func (r renewal) run() error {
	all, err := r.root.sub(volumesDir)
	if err != nil {
		return err
	}
	defer all.Close()
	names, err := all.names()
	if err != nil {
		return err
	}
	for _, id := range names {
		if renewed := r.id(id); renewed != id {
			if err := r.move(all, id, renewed); err != nil {
				return fmt.Errorf("volume %s: %w", id, err)
			}
		}
	}
	return all.sync()
}

// id returns the new ID of a volume; whatever is not this pool's stays.
func (r renewal) id(id string) string {
	name, part, ok := splitID(id)
	if !ok || part != r.from {
		return id
	}
	return name + "-" + r.to + id[len(name)+1+idHexDigits:]
}

// move renames a volume, first in its volume.json. One that cannot be understood stays as it is.
func (r renewal) move(all dir, id, renewed string) error {
	d, err := all.sub(id)
	if err != nil {
		return err
	}
	defer d.Close()
	lock, err := lockDir(d, tryExclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	data, err := d.readFile(volumeFile, volumeLimit)
	var v Volume
	if err == nil && json.Unmarshal(data, &v) == nil && r.id(v.ID) == renewed {
		v.ID = renewed
		if kind, source, ok := strings.Cut(v.Source, ":"); ok {
			volume, _, _ := strings.Cut(source, "@")
			v.Source = kind + ":" + r.id(volume) + source[len(volume):]
		}
		if err := writeVolume(d, v); err != nil {
			return err
		}
	}
	return all.Rename(id, renewed)
}

// Package pool keeps a node's volumes: a directory with one subdirectory per volume, which holds the
// image and what Kubernetes knows about it. All state is in the files; nothing is cached.
//
//	pool.json                      version, UUID and owner: what makes the directory a pool
//	volumes/<id>/image.qcow2       the volume
//	volumes/<id>/volume.json       Volume
//	volumes/<id>/clean, …          Markers
//	creating/<id>/                 as above, half made
//	removing/<id>/                 as above, half removed
//	reserve                        blocks for deletions on a full file system
//
// Three locks, all of them flock(2) on a directory, so that they go with the process that holds them:
// the pool's own directory is held for the moments in which a name is taken; a volume's, exclusively, by its Lease, or
// by its Create while it lies in creating/, or shared by Snapshots. The pool's is taken before a volume's.
package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

var (
	// ErrNotReady is returned by every operation when the directory holds no pool.json, or another pool's: its disk
	// is probably not mounted.
	ErrNotReady = errors.New("pool is not ready")
	errNoPool   = errors.New("it has no " + identityFile + "; is its disk mounted?")
	// ErrNotFound is returned for a volume that this pool does not hold.
	ErrNotFound = errors.New("volume not found")
	// ErrExists is returned when a volume of the name, or of the ID, exists.
	ErrExists = errors.New("volume already exists")
	// ErrInUse is returned when another process, or another goroutine, holds the volume.
	ErrInUse = errors.New("volume is in use")
	// ErrBadID is returned for an ID that this driver cannot have made.
	ErrBadID = errors.New("malformed volume ID")
)

// Names in a pool's directory.
const (
	identityFile = "pool.json"
	volumesDir   = "volumes"
	creatingDir  = "creating"
	removingDir  = "removing"
	reserveFile  = "reserve"

	// EngineLock is the file whose flock the engine holds that serves the pool.
	EngineLock = "engine.lock"
)

// identity is what pool.json holds.
type identity struct {
	Version int    `json:"version"`
	UUID    string `json:"uuid"`
	Node    string `json:"node,omitempty"`  // whose it is; "": that of whoever serves it first
	Birth   string `json:"birth,omitempty"` // see dir.birth
	// Successor is the UUID that Renew is about to give the pool.
	Successor string `json:"successor,omitempty"`
}

const (
	identityVersion = 1
	identityLimit   = 4 << 10 // bytes of pool.json
)

// Pool is an opened pool directory. It is safe for concurrent use, and holds nothing open.
type Pool struct {
	path   string
	uuid   string
	served bool // by node: see OpenOn
	node   string
}

// Open reads pool.json, whosever the pool is: see OpenOn. ErrNotReady if there is none.
func Open(path string) (*Pool, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	root, id, err := enter(path)
	if err != nil {
		return nil, err
	}
	return &Pool{path: path, uuid: id.UUID}, root.Close()
}

// Ready tells whether the directory still is the pool that was opened: nil, ErrNotReady or ErrForeign.
func (p *Pool) Ready() error {
	root, err := p.enter()
	if err != nil {
		return err
	}
	return root.Close()
}

// Dir returns the pool's directory, an absolute path.
func (p *Pool) Dir() string { return p.path }

// UUID returns what identifies the pool, in the usual form.
func (p *Pool) UUID() string { return p.uuid }

// enter opens the pool's directory for one operation. ErrNotReady if it is not the pool any more.
func (p *Pool) enter() (dir, error) {
	root, id, err := enter(p.path)
	if err != nil {
		return dir{}, err
	}
	if id.UUID != p.uuid {
		return dir{}, errors.Join(fmt.Errorf("%w: %s is pool %s now, it was %s", ErrNotReady, p.path, id.UUID, p.uuid), root.Close())
	}
	if p.served {
		if err := id.checkOwner(root, p.node); err != nil {
			return dir{}, errors.Join(err, root.Close())
		}
	}
	return root, nil
}

// enter opens a directory that is a whole pool.
func enter(path string) (dir, identity, error) {
	root, id, err := enterAny(path)
	if err == nil && id.Successor != "" {
		err = fmt.Errorf("%w: %[2]s is being made a pool of its own; if that was interrupted, run "+
			`"csi-qcow2 pool init --new-uuid %[2]s" again`, ErrNotReady, path)
		err = errors.Join(err, root.Close())
	}
	return root, id, err
}

// enterAny also opens one that Renew has not done with.
func enterAny(path string) (dir, identity, error) {
	root, err := openDir(path)
	if err != nil {
		return dir{}, identity{}, fmt.Errorf("%w: %w", ErrNotReady, err)
	}
	id, err := readIdentity(root)
	if errors.Is(err, fs.ErrNotExist) {
		err = errNoPool
	}
	for _, sub := range []string{volumesDir, creatingDir, removingDir} {
		if err == nil {
			err = root.expect(sub, fs.ModeDir)
		}
	}
	if err != nil {
		return dir{}, identity{}, errors.Join(fmt.Errorf("%w: %s: %w", ErrNotReady, path, err), root.Close())
	}
	return root, id, nil
}

func readIdentity(root dir) (identity, error) {
	var id identity
	data, err := root.readFile(identityFile, identityLimit)
	if err != nil {
		return id, err
	}
	if err := json.Unmarshal(data, &id); err != nil {
		return id, fmt.Errorf("%s: %w", identityFile, err)
	}
	switch {
	case id.Version != identityVersion:
		return id, fmt.Errorf("%s: version %d, this program knows %d", identityFile, id.Version, identityVersion)
	case !validUUID(id.UUID) || id.Successor != "" && !validUUID(id.Successor):
		return id, fmt.Errorf("%s: malformed UUID %q", identityFile, id.UUID+id.Successor)
	}
	return id, nil
}

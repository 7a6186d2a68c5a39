package pool

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Lock takes a volume for this caller alone, across processes (the engine's worker holds it while the
// volume is attached). ErrInUse at once if somebody has it, ErrNotFound, ErrBadID. The lock goes with the process.
func (p *Pool) Lock(id string) (*Lease, error) {
	return p.lease(id, tryExclusive)
}

// Snapshots returns the snapshots of a volume that is not attached. ErrInUse when somebody has it.
// Several callers can read at once, and a Lock waits for them.
func (p *Pool) Snapshots(id string) (snapshots []qcow2.Snapshot, err error) {
	l, err := p.lease(id, tryShared)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	img, err := l.Open(true)
	if err != nil {
		return nil, err
	}
	return img.Snapshots(), img.Close()
}

func (p *Pool) lease(id string, mode lockMode) (*Lease, error) {
	parsed, err := ParseID(id)
	if err != nil {
		return nil, err
	}
	d, err := p.openParsed(parsed)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(d, mode)
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	l := &Lease{pool: p, id: parsed, dir: d, lock: lock}
	if err := l.verify(); err != nil {
		return nil, errors.Join(err, l.Unlock())
	}
	return l, nil
}

// Lease is the right to open and change one volume. It is safe for concurrent use.
type Lease struct {
	pool *Pool
	id   ID
	dir  dir
	lock dirLock

	mu     sync.Mutex // guards what follows, and the order of Updates
	volume Volume
}

// verify reads the volume, having made sure that what is locked is still the volume: it may have been
// removed just before it was locked.
func (l *Lease) verify() error {
	now, err := l.pool.openParsed(l.id)
	if err != nil {
		return err
	}
	defer now.Close()
	path, err := now.Stat(".")
	if err != nil {
		return err
	}
	locked, err := l.lock.f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(path, locked) {
		return fmt.Errorf("%w: %s was replaced", ErrNotFound, l.id)
	}
	l.volume, err = readVolume(l.dir, l.id)
	return err
}

// Volume returns what volume.json holds.
func (l *Lease) Volume() Volume {
	l.mu.Lock()
	defer l.mu.Unlock()
	return clone(l.volume)
}

func clone(v Volume) Volume {
	v.Parameters = maps.Clone(v.Parameters)
	v.Asked = maps.Clone(v.Asked)
	return v
}

// Open opens the image, which may give up the pool's reserve: whoever deletes from it calls KeepReserve afterwards. The
// caller closes it before Unlock. ErrInUse if one of QEMU's programs has it.
func (l *Lease) Open(readOnly bool) (*qcow2.Image, error) {
	f, err := l.openFile(readOnly)
	return l.open(f, err, qcow2.OpenOptions{ReadOnly: readOnly})
}

// OpenServed opens the image, past the page cache, for somebody who may die while guests use it: see
// qcow2.OpenOptions.Redo and Trace.
func (l *Lease) OpenServed(redo *qcow2.RedoLog, trace func(qcow2.Phase, time.Duration)) (*qcow2.Image, error) {
	f, err := l.openWith(qcow2.OpenDirectFile)
	return l.open(f, err, qcow2.OpenOptions{Redo: redo, Trace: trace})
}

func (l *Lease) open(f qcow2.File, err error, o qcow2.OpenOptions) (*qcow2.Image, error) {
	if err != nil {
		return nil, err
	}
	o.MakeRoom = l.pool.GiveUpReserve
	return qcow2.Open(f, o)
}

func (l *Lease) openFile(readOnly bool) (qcow2.File, error) {
	return l.openWith(func(path string) (qcow2.File, error) { return qcow2.OpenFile(path, readOnly) })
}

func (l *Lease) openWith(open func(path string) (qcow2.File, error)) (qcow2.File, error) {
	if err := l.dir.expect(imageFile, 0); err != nil {
		return nil, err
	}
	f, err := open(l.pool.imagePath(l.id))
	if errors.Is(err, qcow2.ErrInUse) {
		return nil, fmt.Errorf("%w: %w", ErrInUse, imageOpenError{l.pool.imagePath(l.id), err})
	}
	return f, err
}

// imageOpenError says who has an image, as far as that is known: a program that minds QEMU's locks.
type imageOpenError struct {
	image string
	error
}

func (e imageOpenError) Error() string {
	return "another program, QEMU for example, has the image open (" + e.image + ")"
}
func (e imageOpenError) Unwrap() error { return e.error }

// Update rewrites volume.json durably, with what change has made of it. ID and name stay. Up to 4 KiB, it
// needs no space on the file system; beyond, qcow2.ErrNoSpace when that is full.
func (l *Lease) Update(change func(*Volume)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := clone(l.volume)
	change(&v)
	v.ID, v.Name = l.id.text, l.volume.Name
	if err := writeVolume(l.dir, v); err != nil {
		return fmt.Errorf("update volume %s: %w", l.id, noSpace(err))
	}
	l.volume = clone(v)
	return nil
}

// Remove removes the whole volume; Unlock after. ErrInUse while its image is open, here or in QEMU. Once the
// volume is out of sight it is gone, also if an error says that its space is not: Clean goes on then.
func (l *Lease) Remove() error {
	root, err := l.pool.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := l.hide(root); err != nil {
		return fmt.Errorf("remove volume %s: %w", l.id, err)
	}
	// Not synced: what comes back in a power cut is removed by the next Clean.
	if err := root.RemoveAll(l.id.in(removingDir)); err != nil {
		return fmt.Errorf("remove volume %s: %w", l.id, err)
	}
	return nil
}

// hide moves the volume out of sight, durably.
func (l *Lease) hide(root dir) error {
	f, err := l.openFile(false) // nobody must be using it
	if err == nil {
		defer f.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	from, to := l.id.in(volumesDir), l.id.in(removingDir)
	if err := root.RemoveAll(to); err != nil {
		return err
	}
	if err := root.Rename(from, to); err != nil {
		return err
	}
	return syncSub(root, volumesDir) // a rename is atomic: with the loss of its name, the new one is durable
}

// Unlock gives the volume back.
func (l *Lease) Unlock() error {
	return errors.Join(l.lock.Close(), l.dir.Close())
}

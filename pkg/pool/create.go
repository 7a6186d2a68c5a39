package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

// Create makes a volume that becomes visible, whole, when fill has returned nil: fill writes the image at
// path, which does not exist yet, and the volume has the marks. What an interrupted Create left is removed by Clean.
//
// v.ID is one that NewID made for v.Name. Of several Creates of one name, in this process or others, at
// most one succeeds: the others get ErrExists, some of them after their fill. Tombstones do not count.
// qcow2.ErrNoSpace when the file system is full.
func (p *Pool) Create(ctx context.Context, v Volume, fill func(ctx context.Context, path string) error, marks ...Marker) error {
	id, err := ParseID(v.ID)
	if name, _, _ := splitID(v.ID); err != nil || v.Name == "" || name != safeName(v.Name) || !p.Owns(v.ID) {
		return fmt.Errorf("%w: %.80q is not this pool's for the name %.128q", ErrBadID, v.ID, v.Name)
	}
	if v.Created.IsZero() {
		v.Created = time.Now().UTC()
	}
	root, err := p.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	c := creation{pool: p, root: root, id: id, volume: v, marks: append(marks, Clean)}
	if err := c.begin(); err != nil {
		return fmt.Errorf("create volume %s: %w", v.ID, noSpace(err))
	}
	defer c.end()
	err = c.write(ctx, fill)
	if err == nil {
		err = c.publish()
	}
	if err != nil {
		return fmt.Errorf("create volume %s: %w", v.ID, errors.Join(noSpace(err), c.undo()))
	}
	return nil
}

// creation is a volume in the making. Its directory is locked, which tells Clean that somebody is at work.
type creation struct {
	pool   *Pool
	root   dir
	id     ID // the volume's
	volume Volume
	marks  []Marker

	dir  dir
	lock dirLock
}

func (c *creation) half() string  { return c.id.in(creatingDir) }
func (c *creation) whole() string { return c.id.in(volumesDir) }

// begin makes the directory. It holds the pool's lock from there until it has the directory's.
func (c *creation) begin() (err error) {
	poolLock, err := lockDir(c.root, exclusive)
	if err != nil {
		return err
	}
	defer poolLock.Close()
	if err := c.refuseTaken(); err != nil {
		return err
	}
	if err := c.root.Mkdir(c.half(), 0o700); err != nil {
		return taken(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.root.RemoveAll(c.half()))
		}
	}()
	if c.dir, err = c.root.sub(c.half()); err != nil {
		return err
	}
	if c.lock, err = lockDir(c.dir, tryExclusive); err != nil {
		return errors.Join(err, c.dir.Close())
	}
	return nil
}

// refuseTaken returns ErrExists if there is a volume of the name or the ID.
func (c *creation) refuseTaken() error {
	if _, err := c.root.Lstat(c.whole()); err == nil {
		return ErrExists
	}
	other, err := c.pool.FindByName(c.volume.Name)
	switch {
	case err == nil:
		return fmt.Errorf("%w: %q is %s", ErrExists, c.volume.Name, other.ID)
	case errors.Is(err, ErrNotFound):
		return nil
	}
	return err
}

// taken makes ErrExists of a name that exists.
func taken(err error) error {
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %w", ErrExists, err)
	}
	return err
}

// write fills the directory, durably.
func (c *creation) write(ctx context.Context, fill func(ctx context.Context, path string) error) error {
	// First, so that Space knows what the image may grow to. Twice, so that there is a spare to replace it by.
	for range 2 {
		if err := writeVolume(c.dir, c.volume); err != nil {
			return err
		}
	}
	if err := fill(ctx, filepath.Join(c.pool.path, c.half(), imageFile)); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := syncFile(c.dir, imageFile); err != nil {
		return err
	}
	for _, m := range c.marks {
		if err := c.dir.replaceFile(string(m), nil); err != nil { // it syncs the directory too
			return err
		}
	}
	return nil
}

func syncFile(d dir, name string) error {
	if err := d.expect(name, 0); err != nil {
		return err
	}
	f, err := d.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// publish gives the volume its place, unless somebody else has taken its name since begin.
func (c *creation) publish() error {
	poolLock, err := lockDir(c.root, exclusive)
	if err != nil {
		return err
	}
	defer poolLock.Close()
	if err := c.refuseTaken(); err != nil {
		return err
	}
	if err := c.root.Rename(c.half(), c.whole()); err != nil {
		return taken(err)
	}
	return syncSub(c.root, volumesDir) // a rename is atomic: with its new name, the loss of the old one is durable
}

// undo removes what is not in its place yet.
func (c *creation) undo() error { return c.root.RemoveAll(c.half()) }

func (c *creation) end() {
	_ = c.lock.Close() // nothing is written through it
	_ = c.dir.Close()
}

func syncSub(root dir, name string) error {
	d, err := root.sub(name)
	if err != nil {
		return err
	}
	return errors.Join(d.sync(), d.Close())
}

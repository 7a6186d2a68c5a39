package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// syncEvery is how many paths are copied before they are made durable: like that a copy takes as long as
// the disk needs for it, and not only as long as memory does.
const syncEvery = 64

// copier copies a tree, path by path in order, in the background.
type copier struct {
	from, to string
	tree     tree
	done     atomic.Int64  // paths copied
	ended    chan struct{} // closed at the end
	err      error         // read after ended
}

// startCopy begins to copy; wait for it.
func startCopy(ctx context.Context, from, to string, t tree) *copier {
	c := &copier{from: from, to: to, tree: t, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		c.err = c.run(ctx)
	}()
	return c
}

func (c *copier) run(ctx context.Context) error {
	root, err := os.Open(c.to)
	if err != nil {
		return err
	}
	defer root.Close()
	for i, path := range c.tree.paths {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := copyPath(filepath.Join(c.from, path), filepath.Join(c.to, path)); err != nil {
			return err
		}
		c.done.Add(1)
		if i%syncEvery == 0 {
			if err := unix.Syncfs(int(root.Fd())); err != nil {
				return err
			}
		}
	}
	return nil
}

// reach waits until n paths are copied.
func (c *copier) reach(ctx context.Context, n int64) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for c.done.Load() < n {
		select {
		case <-c.ended:
			return c.err
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// wait waits for the end.
func (c *copier) wait() error {
	<-c.ended
	return c.err
}

func copyPath(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		return errors.Join(os.Mkdir(to, 0o700), os.Chmod(to, info.Mode()))
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case info.Mode().IsRegular():
		return copyFile(from, to, info.Mode())
	}
	return fmt.Errorf("%s is neither a file, a directory nor a link", from)
}

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(mode), out.Close())
}

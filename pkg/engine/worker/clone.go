package worker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// PartSuffix is added to the target's name until the clone is whole.
const PartSuffix = ".part"

// ReservedPrefix begins the names of the snapshots that exist only while a clone reads them. No listing
// shows them; those that a dead worker left are deleted when the volume is attached the next time.
const ReservedPrefix = ".csi-qcow2-clone."

// IsReservedSnapshot tells whether a snapshot name is one of those.
func IsReservedSnapshot(name string) bool { return strings.HasPrefix(name, ReservedPrefix) }

// clone is a running Clone of one state of an attached volume, whose I/O goes on.
type clone struct {
	source    *served
	view      *qcow2.View
	temporary qcow2.Selector // the snapshot that was made for this clone
	cleanUp   bool           // temporary is to be deleted
}

// openClone opens a snapshot, or, when its name is empty, one that is made of the present content and
// goes with the clone. The caller calls run.
func (s *served) openClone(snapshot string) (*clone, error) {
	c := &clone{source: s}
	which := qcow2.ByName(snapshot)
	if snapshot == "" {
		made, err := s.img.CreateSnapshot(s.tasksCtx, ReservedPrefix+rand.Text(), nil)
		if err != nil {
			return nil, err
		}
		which = qcow2.ByIDAndName(made.ID, made.Name)
		c.temporary, c.cleanUp = which, true
	}
	view, err := s.img.OpenSnapshot(which)
	if err != nil {
		return nil, errors.Join(err, c.deleteTemporary())
	}
	c.view = view
	s.tasks.Add(1)
	return c, nil
}

// run writes the clone and lets go of the source.
func (c *clone) run(target string, size int64) error {
	defer c.source.tasks.Done()
	err := writeClone(c.source.tasksCtx, c.view, target, size)
	if c.source.tasksCtx.Err() != nil {
		err = rpc.Refuse(rpc.ErrUnavailable, "the source is being detached: %w", err)
	}
	if closeErr := c.view.Close(); closeErr != nil {
		klog.ErrorS(closeErr, "Source of a clone does not close", "target", target)
	}
	if deleteErr := c.deleteTemporary(); deleteErr != nil {
		// The next attach deletes it. The clone itself is good.
		klog.ErrorS(deleteErr, "Snapshot of a clone stays", "target", target)
	}
	return err
}

func (c *clone) deleteTemporary() error {
	if !c.cleanUp {
		return nil
	}
	return c.source.img.DeleteSnapshot(context.WithoutCancel(c.source.tasksCtx), c.temporary)
}

// writeClone writes view as a standalone image that appears at target, durably, when it is whole.
func writeClone(ctx context.Context, view *qcow2.View, target string, size int64) (err error) {
	if _, err := os.Lstat(target); err == nil {
		return fmt.Errorf("%s: %w", target, qcow2.ErrExists)
	}
	part := target + PartSuffix
	if err := os.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := qcow2.CreateFile(part)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(part)
		}
	}()
	err = qcow2.Clone(ctx, f, view, size, nil)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("clone to %s: %w", target, err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, target, unix.RENAME_NOREPLACE); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = qcow2.ErrExists
		}
		return fmt.Errorf("clone to %s: %w", target, err)
	}
	return syncDir(filepath.Dir(target))
}

// reservedSnapshots returns the snapshots of clones that no worker has under way: ask before the first.
func reservedSnapshots(img *qcow2.Image) []qcow2.Snapshot {
	return slices.DeleteFunc(img.Snapshots(), func(s qcow2.Snapshot) bool { return !IsReservedSnapshot(s.Name) })
}

// sweepClones deletes the snapshots of clones whose worker died. One that stays only takes space.
func sweepClones(ctx context.Context, img *qcow2.Image, volume string, orphans []qcow2.Snapshot) {
	for _, s := range orphans {
		if err := img.DeleteSnapshot(ctx, qcow2.ByIDAndName(s.ID, s.Name)); err != nil {
			klog.ErrorS(err, "Snapshot of an interrupted clone stays", "volume", volume, "snapshot", s.Name)
		}
	}
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

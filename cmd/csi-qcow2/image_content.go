package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// content is the active disk, or a snapshot, of an image.
type content struct {
	*qcow2.View
	path   string
	shared *qcow2.Snapshot // not nil: others have the image open, and may delete this snapshot
}

// withContent opens what is chosen of the image at path for work. Of an image that is in use it must be a snapshot.
func withContent(cmd *cobra.Command, path string, snapshot *snapshotFlags, look *lookFlags, work func(*content) error) (err error) {
	if !snapshot.given {
		if look.shared {
			return wrongUsage(cmd, errors.New("the active disk of an image that is in use changes while it is read: -U needs --snapshot"))
		}
		return withImage(path, true, func(img *qcow2.Image) error { return snapshot.with(img, path, nil, work) })
	}
	img, err := look.open(cmd.Context(), path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if !img.shared {
		return snapshot.with(img.Image, path, nil, work)
	}
	selector, err := findSnapshot(img.Image, snapshot.name, snapshot.isID)
	if err != nil {
		return err
	}
	taken, err := img.FindSnapshot(selector)
	if err != nil {
		return err
	}
	return snapshot.with(img.Image, path, &taken, work)
}

// with opens what is chosen for work.
func (s *snapshotFlags) with(img *qcow2.Image, path string, shared *qcow2.Snapshot, work func(*content) error) error {
	view, err := s.open(img)
	if err != nil {
		return err
	}
	c := &content{View: view, path: path, shared: shared}
	return errors.Join(work(c), view.Close())
}

// confirm returns the outcome of reading all of the content, err: a snapshot that others have deleted meanwhile may have read
// as anything.
func (c *content) confirm(err error) error {
	if c.shared == nil {
		return err
	}
	kept, lookErr := qcow2.SnapshotKept(c.path, *c.shared)
	switch {
	case lookErr != nil:
		return errors.Join(err, lookErr)
	case !kept:
		return fmt.Errorf("snapshot %s was deleted while it was read: %w", printable(c.shared.Name), qcow2.ErrNotFound)
	}
	return err
}

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// findSnapshot returns the snapshot that has the name, or the ID. A name that several have is refused: names need not be
// unique in an image that QEMU wrote.
func findSnapshot(img *qcow2.Image, name string, isID bool) (qcow2.Selector, error) {
	if isID {
		_, err := img.FindSnapshot(qcow2.ByID(name))
		return qcow2.ByID(name), err
	}
	var ids []string
	hint := ""
	for _, s := range img.Snapshots() {
		if s.Name == name {
			ids = append(ids, printable(s.ID))
		}
		if s.ID == name {
			hint = fmt.Sprintf(" (it is the ID of snapshot %s, which --id means)", printable(s.Name))
		}
	}
	switch len(ids) {
	case 0:
		return qcow2.Selector{}, fmt.Errorf("snapshot %s: %w%s", printable(name), qcow2.ErrNotFound, hint)
	case 1:
		return qcow2.ByName(name), nil
	}
	return qcow2.Selector{}, fmt.Errorf("%d snapshots have the name %s, their IDs are %s: say which with --id",
		len(ids), printable(name), strings.Join(ids, ", "))
}

func openSnapshot(img *qcow2.Image, name string, isID bool) (*qcow2.View, error) {
	selector, err := findSnapshot(img, name, isID)
	if err != nil {
		return nil, err
	}
	return img.OpenSnapshot(selector)
}

// snapshotFlags choose the content of an image that a command reads.
type snapshotFlags struct {
	name  string
	given bool // there is a name, if only ""
	isID  bool
}

func addSnapshotFlags(cmd *cobra.Command) *snapshotFlags {
	s := new(snapshotFlags)
	cmd.Flags().Var(s, "snapshot", "the `name` of the snapshot to read; the active content without")
	addIDFlag(cmd, &s.isID, "what --snapshot gives is an ID")
	return s
}

func addIDFlag(cmd *cobra.Command, isID *bool, usage string) {
	cmd.Flags().BoolVar(isID, "id", false, usage)
}

func (s *snapshotFlags) String() string { return s.name }
func (s *snapshotFlags) Type() string   { return "name" }

func (s *snapshotFlags) Set(name string) error {
	s.name, s.given = name, true
	return nil
}

// open returns what is chosen: the active content, if no snapshot is.
func (s *snapshotFlags) open(img *qcow2.Image) (*qcow2.View, error) {
	switch {
	case !s.given && s.isID:
		return nil, errors.New("--id without --snapshot: which one?")
	case !s.given:
		return img.Active(), nil
	}
	return openSnapshot(img, s.name, s.isID)
}

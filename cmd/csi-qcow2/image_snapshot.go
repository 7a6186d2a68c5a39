package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// snapshotInfo is a snapshot in JSON, with the keys of `qemu-img info --output=json` and the disk size.
type snapshotInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	VMStateSize int64  `json:"vm-state-size"`
	DateSec     int64  `json:"date-sec"`
	DateNsec    int    `json:"date-nsec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	VMClockNsec int64  `json:"vm-clock-nsec"`
	Icount      *int64 `json:"icount,omitempty"`
	DiskSize    int64  `json:"disk-size"`
}

func describeSnapshot(s qcow2.Snapshot) snapshotInfo {
	info := snapshotInfo{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, DiskSize: s.DiskSize,
		DateSec: s.Date.Unix(), DateNsec: s.Date.Nanosecond(),
		VMClockSec: int64(s.VMClock / time.Second), VMClockNsec: int64(s.VMClock % time.Second),
	}
	if s.Icount <= math.MaxInt64 { // else it is not known
		n := int64(s.Icount)
		info.Icount = &n
	}
	return info
}

func snapshotTable(w io.Writer, snapshots []qcow2.Snapshot) {
	fmt.Fprintln(w, "ID\tNAME\tTAKEN\tDISK SIZE\tVM STATE")
	for _, s := range snapshots {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", printable(s.ID), printable(s.Name),
			localTime(s.Date), humanSize(s.DiskSize), humanSize(s.VMStateSize))
	}
}

// localTime writes a time with its zone.
func localTime(t time.Time) string { return t.Local().Format(time.DateTime + " MST") }

func newImageSnapshotCommand() *cobra.Command {
	group := newGroup("snapshot", "Take, restore, delete, list and compare snapshots of an image",
		`Take, restore, delete, rename, list and compare the internal snapshots of an image. Each change is one atomic
switch: after a crash the image is as before or as after.

NAME is a snapshot's name; with --id, its ID. The two are never taken for each other, and a name that several
snapshots have, as QEMU allows, is refused.`,
		newSnapshotListCommand(),
		newSnapshotCreateCommand(),
		newSnapshotChange("goto", "Make the active disk what it was at a snapshot",
			"Make the active disk, its size included, what it was at a snapshot. What was written since is lost; the\nsnapshots stay.",
			gotoSnapshot),
		newSnapshotChange("delete", "Delete a snapshot and free what only it held",
			"Delete a snapshot and free what only it held.",
			deleteSnapshot),
		newSnapshotRenameCommand(),
		newSnapshotDiffCommand())
	group.Example = `  csi-qcow2 image snapshot create disk.qcow2 before-upgrade
  csi-qcow2 image snapshot list disk.qcow2 -o json
  csi-qcow2 image snapshot diff disk.qcow2 before-upgrade
  csi-qcow2 image snapshot goto disk.qcow2 before-upgrade
  csi-qcow2 image snapshot delete disk.qcow2 --id 3`
	return group
}

func createSnapshot(ctx context.Context, img *qcow2.Image, name string) error {
	_, err := img.CreateSnapshot(ctx, name, nil)
	return err
}

// changeOfSnapshot is a change of the snapshot that s selects.
type changeOfSnapshot func(ctx context.Context, img *qcow2.Image, s qcow2.Selector) error

func gotoSnapshot(ctx context.Context, img *qcow2.Image, s qcow2.Selector) error {
	return img.GotoSnapshot(ctx, s)
}

func deleteSnapshot(ctx context.Context, img *qcow2.Image, s qcow2.Selector) error {
	return img.DeleteSnapshot(ctx, s)
}

func newSnapshotCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "create FILE NAME", Short: "Take a snapshot of the active disk",
		Long: "Take a snapshot of the active disk. The name must be free.",
		Args: takes("FILE", "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withImage(args[0], false, func(img *qcow2.Image) error { return createSnapshot(cmd.Context(), img, args[1]) })
		},
	}
}

func newSnapshotChange(verb, short, long string, change changeOfSnapshot) *cobra.Command {
	cmd := &cobra.Command{Use: verb + " FILE NAME", Short: short, Long: long, Args: takes("FILE", "NAME")}
	isID := false
	addIDFlag(cmd, &isID, "NAME is an ID")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return changeSnapshot(cmd.Context(), args, isID, change)
	}
	return cmd
}

// changeSnapshot changes the snapshot of the image in args[0] that is called args[1].
func changeSnapshot(ctx context.Context, args []string, isID bool, change changeOfSnapshot) error {
	return withImage(args[0], false, func(img *qcow2.Image) error {
		selector, err := findSnapshot(img, args[1], isID)
		if err != nil {
			return err
		}
		return change(ctx, img, selector)
	})
}

func newSnapshotRenameCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rename FILE NAME NEW", Short: "Give a snapshot another name",
		Long: `Give a snapshot another name, which must be free. Its ID stays. A VolumeSnapshot means its snapshot by the name:
once that is another, it is lost to the cluster.`,
		Example: "  csi-qcow2 image snapshot rename disk.qcow2 before-upgrade v1",
		Args:    takes("FILE", "NAME", "NEW"),
	}
	isID := false
	addIDFlag(cmd, &isID, "NAME is an ID")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return changeSnapshot(cmd.Context(), args, isID, func(ctx context.Context, img *qcow2.Image, s qcow2.Selector) error {
			return img.RenameSnapshot(ctx, s, args[2])
		})
	}
	return cmd
}

func newSnapshotListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list FILE",
		Short: "List the snapshots of an image",
		Long: `List the snapshots of an image. Of an attached volume the engine is asked; -U reads the file of any image that
is in use.`,
		Args: takes("FILE"),
	}
	output, look := addOutputFlag(cmd), addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var snapshots []qcow2.Snapshot
		err := look.look(cmd.Context(), args[0], func(img *looked) error {
			snapshots = img.snapshots()
			return nil
		})
		if err != nil {
			return err
		}
		list := make([]snapshotInfo, 0, len(snapshots))
		for _, s := range snapshots {
			list = append(list, describeSnapshot(s))
		}
		return output.print(cmd.OutOrStdout(), list, func(w io.Writer) { snapshotTable(w, snapshots) })
	}
	return cmd
}

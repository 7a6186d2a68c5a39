package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// diffEntry is one of `image snapshot diff -o json`.
type diffEntry struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
	Zero   bool  `json:"zero"`
}

func newSnapshotDiffCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff FILE FROM [TO]",
		Short: "Show which parts of the disk have changed since a snapshot",
		Long: `Show which parts of the disk have changed from snapshot FROM to snapshot TO, or to the active disk: "data"
was written, and may be what it was before; "zero" was discarded or zeroed. All else reads the same in both.
What lies behind the end of a smaller FROM counts as zeros. No data is read, so it takes seconds for 1 TiB.

The device of an attached volume is flushed first, if there is no TO. With -U it is what the file says.`,
		Example: `  csi-qcow2 image snapshot diff disk.qcow2 monday
  csi-qcow2 image snapshot diff disk.qcow2 monday tuesday -o json`,
		Args: takes("FILE", "FROM", "[TO]"),
	}
	isID := false
	addIDFlag(cmd, &isID, "FROM and TO are IDs")
	output, look := addOutputFlag(cmd), addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		look.current = len(args) == 2
		var changes []qcow2.Change
		err := look.look(cmd.Context(), args[0], func(img *looked) (err error) {
			changes, err = diff(cmd.Context(), img.Image, args[1:], isID)
			return err
		})
		if err != nil {
			return err
		}
		entries := make([]diffEntry, 0, len(changes))
		for _, c := range changes {
			entries = append(entries, diffEntry{c.Offset, c.Length, c.Zero})
		}
		return output.print(cmd.OutOrStdout(), entries, func(w io.Writer) { diffTable(w, changes) })
	}
	return cmd
}

// diff returns what has changed since the first of one or two snapshots.
func diff(ctx context.Context, img *qcow2.Image, names []string, isID bool) (changes []qcow2.Change, err error) {
	from, err := openSnapshot(img, names[0], isID)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	to := img.Active()
	if len(names) > 1 {
		if to, err = openSnapshot(img, names[1], isID); err != nil {
			return nil, err
		}
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	err = to.Diff(ctx, from, func(c qcow2.Change) error {
		changes = append(changes, c)
		return nil
	})
	return changes, err
}

func diffTable(w io.Writer, changes []qcow2.Change) {
	fmt.Fprintln(w, "START\tLENGTH\tCHANGE")
	var data, zero int64
	for _, c := range changes {
		kind, sum := "data", &data
		if c.Zero {
			kind, sum = "zero", &zero
		}
		*sum += c.Length
		fmt.Fprintf(w, "%#x\t%#x\t%s\n", c.Offset, c.Length, kind)
	}
	fmt.Fprintf(w, "\nwritten: %s, zeroed: %s\n", humanSize(data), humanSize(zero))
}

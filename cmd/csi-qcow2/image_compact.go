package main

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageCompactCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compact FILE",
		Short: "Give back the space of zeros, and of what nothing uses",
		Long: `Give the file system back what the image occupies for nothing: clusters of the active disk that hold only zeros,
leaked ones, and free ones that QEMU has left in the file. The content stays what it is, and so do the snapshots,
with all that they need. An interrupted run has done a part, and another one does the rest.

What was preallocated and never written is given back as well. What a guest has deleted is no zeros: let it run
fstrim first, or write zeros to its free space.`,
		Example: `  csi-qcow2 image compact disk.qcow2`,
		Args:    takes("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			before, err := blocksOf(args[0])
			if err != nil {
				return err
			}
			err = withImage(args[0], false, func(img *qcow2.Image) error {
				p := newProgress(cmd.ErrOrStderr(), "compacting", args[0])
				defer p.end()
				return compact(cmd.Context(), img, p)
			})
			if err != nil {
				return err
			}
			after, err := blocksOf(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s occupies %s, before it was %s.\n", printable(args[0]), humanSize(after), humanSize(before))
			return err
		},
	}
	return cmd
}

// blocksOf returns how many bytes a file occupies.
func blocksOf(path string) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

func compact(ctx context.Context, img *qcow2.Image, p *progress) error {
	if err := discardZeros(ctx, img, p); err != nil {
		return err
	}
	if err := img.Flush(); err != nil {
		return err
	}
	if _, err := img.ReclaimLeaks(ctx); err != nil {
		return err
	}
	return img.PunchFree(ctx)
}

// discardZeros discards the clusters of the active disk that are data, and zeros.
func discardZeros(ctx context.Context, img *qcow2.Image, p *progress) error {
	extents, err := readMap(img, new(snapshotFlags))
	if err != nil {
		return err
	}
	buffer := make([]byte, copyChunk)
	for _, e := range extents {
		if e.Kind != qcow2.Data && e.Kind != qcow2.Compressed {
			continue
		}
		for off, end := e.Offset, e.Offset+e.Length; off < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			data := buffer[:min(copyChunk-off%copyChunk, end-off)]
			if err := discardZerosOf(img, data, off); err != nil {
				return err
			}
			off += int64(len(data))
			p.update(off, img.Size())
		}
	}
	return nil
}

// discardZerosOf reads what is at off into data, and discards what lies between the runs of clusters that are not zeros.
func discardZerosOf(img *qcow2.Image, data []byte, off int64) error {
	if err := readFull(img, data, off); err != nil {
		return err
	}
	end := off + int64(len(data))
	discard := func(from, to int64) error {
		if from == to {
			return nil
		}
		return img.Discard(from, to-from)
	}
	err := nonZeroRuns(data, off, img.ClusterSize(), func(run []byte, at int64) error {
		zeros := off
		off = at + int64(len(run))
		return discard(zeros, at)
	})
	if err != nil {
		return err
	}
	return discard(off, end)
}

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// copyChunk is how many bytes are read at once: one cluster at least, of any size.
const copyChunk = 2 << 20

// sparseUnit is the length, and the alignment, from which on zeros in data become a hole.
const sparseUnit = 4096

func newImageExportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export FILE OUT",
		Short: "Write the disk, or a snapshot of it, as a raw file",
		Long: `Write the active disk, or a snapshot, as the raw file OUT, which must not exist; it appears when it is whole.
Zeros become holes. With OUT "-" everything is written to standard output.

If OUT is a block device that nobody uses, with --force its beginning is overwritten, zeros included; if that is
interrupted it holds a part. What lies behind the end of the disk stays.

A snapshot of an attached volume, or with -U of any image that is in use, can be exported too: its content does
not change. If it is deleted meanwhile, the export fails.`,
		Example: `  csi-qcow2 image export disk.qcow2 disk.raw
  csi-qcow2 image export disk.qcow2 - --snapshot before-upgrade | sha256sum
  csi-qcow2 image export --force disk.qcow2 /dev/vg/disk`,
		Args: takes("FILE", "OUT"),
	}
	force := cmd.Flags().Bool("force", false, "overwrite the block device OUT")
	snapshot, look := addSnapshotFlags(cmd), addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withContent(cmd, args[0], snapshot, look, func(c *content) error {
			p := newProgress(cmd.ErrOrStderr(), "exporting", args[0])
			defer p.end()
			switch {
			case args[1] == "-":
				return exportStream(cmd.Context(), cmd.OutOrStdout(), c, p)
			case isBlockDevice(args[1]) && !*force:
				return fmt.Errorf("%s is a block device: --force overwrites what it holds", args[1])
			case isBlockDevice(args[1]):
				return exportDevice(cmd.Context(), args[1], c, p)
			}
			return exportFile(cmd.Context(), args[1], c, p)
		})
	}
	return cmd
}

func exportStream(ctx context.Context, w io.Writer, view *content, p *progress) error {
	out := bufio.NewWriterSize(w, copyChunk)
	zeros := make([]byte, copyChunk)
	err := readView(ctx, view, p, func(data []byte, _, n int64) error {
		if data == nil {
			data = zeros[:n]
		}
		_, err := out.Write(data)
		return err
	})
	return errors.Join(err, out.Flush())
}

func exportFile(ctx context.Context, path string, view *content, p *progress) (err error) {
	f, err := createNewFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	err = readView(ctx, view, p, func(data []byte, off, _ int64) error { return writeSparse(f, data, off) })
	if err != nil {
		return err
	}
	if err := f.Truncate(view.Size()); err != nil {
		return err
	}
	return f.keep()
}

func isBlockDevice(path string) bool {
	stat, err := os.Stat(path)
	return err == nil && stat.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
}

// exportDevice writes to a block device, which is opened exclusively: one that is mounted is refused.
func exportDevice(ctx context.Context, path string, view *content, p *progress) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_EXCL, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if size < view.Size() {
		return fmt.Errorf("%s has %d bytes, the disk %d: make the device larger", path, size, view.Size())
	}
	zeros := make([]byte, copyChunk)
	err = readView(ctx, view, p, func(data []byte, off, n int64) error {
		if data == nil {
			const zero = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
			if unix.Fallocate(int(f.Fd()), zero, off, n) == nil {
				return nil
			}
			data = zeros[:n] // the device, or this range, is not for that
		}
		_, err := f.WriteAt(data, off)
		return err
	})
	if err != nil {
		return err
	}
	return f.Sync()
}

// readView gives the whole content to fn, in order, in pieces of at most copyChunk bytes: data, or nil for n
// bytes of zeros at off.
func readView(ctx context.Context, view *content, p *progress, fn func(data []byte, off, n int64) error) error {
	buffer := make([]byte, copyChunk)
	err := view.Extents(0, func(e qcow2.Extent) error {
		hole := e.Kind == qcow2.Unallocated || e.Kind == qcow2.Zero
		for done := int64(0); done < e.Length; {
			if err := ctx.Err(); err != nil {
				return err
			}
			off, n := e.Offset+done, min(e.Length-done, copyChunk)
			var data []byte
			if !hole {
				data = buffer[:n]
				if err := readFull(view, data, off); err != nil {
					return err
				}
			}
			if err := fn(data, off, n); err != nil {
				return err
			}
			done += n
			p.update(off+n, view.Size())
		}
		return nil
	})
	return view.confirm(err)
}

// readFull fills p from off on.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

// writeSparse writes those parts of data that are not zeros; f has a hole in the place of the others.
func writeSparse(f io.WriterAt, data []byte, off int64) error {
	return nonZeroRuns(data, off, sparseUnit, func(run []byte, off int64) error {
		_, err := f.WriteAt(run, off)
		return err
	})
}

// nonZeroRuns calls fn for each run of data that is not zeros, whole units at a time. The data is that at off,
// a multiple of unit.
func nonZeroRuns(data []byte, off, unit int64, fn func(run []byte, off int64) error) error {
	length := int64(len(data))
	for at := int64(0); at < length; {
		end := at
		for end < length && !isZero(data[end:min(end+unit, length)]) {
			end = min(end+unit, length)
		}
		if end > at {
			if err := fn(data[at:end], off+at); err != nil {
				return err
			}
		}
		at = end + unit
	}
	return nil
}

func isZero(b []byte) bool {
	return len(b) == 0 || (b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1]))
}

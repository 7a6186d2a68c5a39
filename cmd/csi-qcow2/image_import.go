package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageImportCommand() *cobra.Command {
	var flags createFlags
	var format string
	cmd := &cobra.Command{
		Use:   "import RAW FILE",
		Short: "Make an image out of a raw file or a block device",
		Long: `Make the image FILE, which must not exist, out of a raw file or a block device. Its size is rounded up to a
multiple of 512. Zeros take no space. FILE appears when it is whole.

A file of another format (qcow2, vmdk, vhdx, vpc, vdi, luks, …, or one that is packed) is refused: it would
become a disk that holds such a file. A raw disk that happens to begin like one is imported with --format raw.`,
		Example: `  csi-qcow2 image import disk.raw disk.qcow2
  csi-qcow2 image import --format raw /dev/vg/encrypted disk.qcow2`,
		Args: takes("RAW", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			// Without O_NONBLOCK, opening a FIFO would wait for its other end.
			raw, err := os.OpenFile(args[0], os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				return err
			}
			defer raw.Close()
			size, err := rawSize(raw)
			if err != nil {
				return err
			}
			if err := checkFormat(raw, size, format); err != nil {
				return err
			}
			p := newProgress(cmd.ErrOrStderr(), "importing "+args[0])
			defer p.end()
			return flags.create(cmd.Context(), args[1], size, func(img *qcow2.Image) error {
				return importRaw(cmd.Context(), img, raw, size, p)
			})
		},
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&format, "format", "", "`raw`: what RAW looks like does not matter")
	return cmd
}

// checkFormat refuses what seems to be no raw disk, unless format says that it is one.
func checkFormat(raw *os.File, size int64, format string) error {
	switch format {
	case "raw":
		return nil
	case "":
		seems, err := foreignFormat(raw, size)
		if err != nil {
			return fmt.Errorf("%s: %w", raw.Name(), err)
		}
		return refuseForeign(raw.Name(), seems)
	}
	return fmt.Errorf("--format %s: only raw disks can be imported; `qemu-img convert` knows other formats", format)
}

// rawSize returns the length of a regular file or a block device.
func rawSize(f *os.File) (int64, error) {
	stat, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if mode := stat.Mode(); !mode.IsRegular() && (mode&os.ModeDevice == 0 || mode&os.ModeCharDevice != 0) {
		return 0, fmt.Errorf("%s is neither a regular file nor a block device", f.Name())
	}
	return f.Seek(0, io.SeekEnd)
}

func importRaw(ctx context.Context, img *qcow2.Image, raw *os.File, size int64, p *progress) error {
	buffer := make([]byte, copyChunk)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := nextData(raw, off, size)
		if err != nil {
			return err
		}
		if off = data / copyChunk * copyChunk; off >= size {
			break
		}
		n := min(copyChunk, size-off)
		if err := readFull(raw, buffer[:n], off); err != nil {
			return fmt.Errorf("%s: %w", raw.Name(), err)
		}
		err = nonZeroRuns(buffer[:n], off, img.ClusterSize(), func(run []byte, off int64) error {
			_, err := img.WriteAt(run, off)
			return err
		})
		if err != nil {
			return err
		}
		off += n
		p.update(off, size)
	}
	return img.Flush()
}

// nextData returns where, from off on, the file's next data begins, or size if only a hole follows. A file
// that does not tell is all data.
func nextData(raw *os.File, off, size int64) (int64, error) {
	data, err := unix.Seek(int(raw.Fd()), off, unix.SEEK_DATA)
	switch {
	case err == nil:
		return data, nil
	case errors.Is(err, unix.ENXIO):
		return size, nil
	case errors.Is(err, unix.EINVAL):
		return off, nil
	}
	return 0, fmt.Errorf("seek in %s: %w", raw.Name(), err)
}

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

func newImageImportCommand() *cobra.Command {
	var flags createFlags
	var raw bool
	cmd := &cobra.Command{
		Use:   "import SRC FILE",
		Short: "Make an image out of a raw disk, or of another image",
		Long: `Make the image FILE, which must not exist, out of a raw file, a block device, or with SRC "-" of what comes on
standard input. Its size is rounded up to a multiple of 512. Zeros take no space. FILE appears when it is whole.

A qcow2 image is read as what it is, compressed or not, of any version; the new one has its active content, and no
snapshots. A file of another format (vmdk, vhdx, vpc, vdi, luks, …, or one that is packed) is refused: it would
become a disk that holds such a file. With --raw, what SRC looks like does not matter.`,
		Example: `  csi-qcow2 image import disk.raw disk.qcow2
  csi-qcow2 image import compressed.qcow2 disk.qcow2
  csi-qcow2 image import --raw /dev/vg/encrypted disk.qcow2
  zstdcat disk.raw.zst | csi-qcow2 image import - disk.qcow2`,
		Args: takes("SRC", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "-" {
				return importStream(cmd, args[1], raw, &flags)
			}
			return importFile(cmd, args[0], args[1], raw, &flags)
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&raw, "raw", false, "SRC is a raw disk, whatever it looks like")
	return cmd
}

func importFile(cmd *cobra.Command, path, image string, isRaw bool, flags *createFlags) error {
	// Without O_NONBLOCK, opening a FIFO would wait for its other end.
	raw, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer raw.Close()
	size, err := rawSize(raw)
	if err != nil {
		return err
	}
	if !isRaw {
		format, err := foreignFormat(raw, size)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if format == "qcow2" {
			return importImage(cmd, path, image, flags)
		}
		if err := refuseForeign(path, format); err != nil {
			return err
		}
	}
	p := newProgress(cmd.ErrOrStderr(), "importing", path)
	defer p.end()
	return flags.create(cmd.Context(), image, size, func(img *qcow2.Image) error {
		return importRaw(cmd.Context(), img, raw, size, p)
	})
}

// importImage makes an image with the active content of another.
func importImage(cmd *cobra.Command, path, image string, flags *createFlags) error {
	source, err := openImage(path, true)
	if errors.Is(err, qcow2.ErrUnsupported) {
		return fmt.Errorf("%w: QEMU may be able to convert it, `qemu-img convert -O qcow2 %s FILE`", err, path)
	}
	if err != nil {
		return err
	}
	p := newProgress(cmd.ErrOrStderr(), "importing", path)
	defer p.end()
	err = flags.create(cmd.Context(), image, source.Size(), func(img *qcow2.Image) error {
		err := readView(cmd.Context(), &content{View: source.Active()}, p, func(data []byte, off, _ int64) error {
			return writeData(img, data, off)
		})
		if err != nil {
			return err
		}
		return img.Flush()
	})
	return errors.Join(err, source.Close())
}

// writeData writes those clusters of data, which lies at off of an empty image, that are not zeros.
func writeData(img *qcow2.Image, data []byte, off int64) error {
	return nonZeroRuns(data, off, img.ClusterSize(), func(run []byte, off int64) error {
		_, err := img.WriteAt(run, off)
		return err
	})
}

const (
	// streamPiece is how much of a stream is read before the image is made longer by as much.
	streamPiece = 16 << 20
	// headBytes is what is looked at to tell a format.
	headBytes = 2048
)

// importStream makes an image of standard input, whose length is not known before its end.
func importStream(cmd *cobra.Command, image string, isRaw bool, flags *createFlags) error {
	in := bufio.NewReaderSize(cmd.InOrStdin(), copyChunk)
	head, err := in.Peek(headBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("standard input: %w", err)
	}
	if !isRaw {
		format, err := foreignFormat(bytes.NewReader(head), int64(len(head)))
		if err != nil {
			return err
		}
		if format != "" {
			return fmt.Errorf("standard input seems to be no raw disk, but a file of format %s: save it, and import that. "+
				"If it is a raw disk that happens to look like that, say so with --raw", format)
		}
	}
	p := newProgress(cmd.ErrOrStderr(), "importing", "standard input")
	defer p.end()
	return flags.create(cmd.Context(), image, 0, func(img *qcow2.Image) error { return appendStream(cmd.Context(), img, in, p) })
}

// appendStream makes what comes from in the content of an image of no length.
func appendStream(ctx context.Context, img *qcow2.Image, in io.Reader, p *progress) error {
	pieces, end := readPieces(ctx, in), int64(0)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case piece, more := <-pieces:
			if !more {
				return img.Flush()
			}
			if piece.err != nil {
				return fmt.Errorf("standard input: %w", piece.err)
			}
			if err := img.Resize(ctx, roundUp(end+int64(len(piece.data)), 512)); err != nil {
				return err
			}
			if err := writeData(img, piece.data, end); err != nil {
				return err
			}
			end += int64(len(piece.data))
			p.update(end, 0)
		}
	}
}

type streamed struct {
	data []byte
	err  error
}

// readPieces sends what comes from in, in pieces that are of streamPiece bytes but for the last, until in ends or ctx does. A
// read from a pipe cannot be interrupted: then the goroutine stays, and ends with the process.
func readPieces(ctx context.Context, in io.Reader) <-chan streamed {
	pieces := make(chan streamed)
	go func() {
		defer close(pieces)
		for last := false; !last; {
			data := make([]byte, streamPiece)
			n, err := io.ReadFull(in, data)
			if last = err != nil; errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = nil
			}
			if n == 0 && err == nil {
				return
			}
			select {
			case pieces <- streamed{data[:n], err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return pieces
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
		if err := writeData(img, buffer[:n], off); err != nil {
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

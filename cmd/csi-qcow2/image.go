package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageCommand() *cobra.Command {
	image := newGroup("image", "Work on a qcow2 image",
		`Create, look at, check, convert and snapshot qcow2 images, versions 2 and 3. An image that QEMU or the
engine has open is refused, by who has it. What only looks, "info", "map" and "snapshot list", and the export of a
snapshot, also works on the image of an attached volume, and with -U on any.

Sizes are decimal numbers of bytes, or have a suffix K, M, G, T, P (powers of 1024, also written GiB), then also
with a fraction; 0x… is hexadecimal.
Snapshots are meant by their name, and by nothing else: with --id, what is given is an ID (QEMU looks at IDs
first, then at names).

What makes a new file gives it its name when it is whole: a run that fails or is killed leaves no such file.`,
		newImageCreateCommand(), newImageInfoCommand(), newImageMapCommand(), newImageResizeCommand(),
		newImageCheckCommand(), newImageCompactCommand(), newImageCloneCommand(), newImageExportCommand(), newImageImportCommand(), newImageSnapshotCommand(), newImageIOCommand())
	image.Example = `  csi-qcow2 image create disk.qcow2 10G
  csi-qcow2 image import disk.raw disk.qcow2
  csi-qcow2 image snapshot create disk.qcow2 before-upgrade
  csi-qcow2 image snapshot goto disk.qcow2 before-upgrade
  csi-qcow2 image check disk.qcow2`
	return image
}

// withImage opens the image at path for work and closes it afterwards.
func withImage(path string, readOnly bool, work func(*qcow2.Image) error) (err error) {
	img, err := openImage(path, readOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	return work(img)
}

func openImage(path string, readOnly bool) (*qcow2.Image, error) {
	f, err := qcow2.OpenFile(path, readOnly)
	if err != nil {
		return nil, inUse(path, err)
	}
	return qcow2.Open(f, qcow2.OpenOptions{ReadOnly: readOnly})
}

// createFlags are those of the commands that make an image.
type createFlags struct {
	clusterSize   sizeFlag
	version       int
	refcountBits  int
	extendedL2    bool
	preallocation string
}

func (c *createFlags) register(cmd *cobra.Command) {
	c.clusterSize = qcow2.DefaultClusterSize
	cmd.Flags().Var(&c.clusterSize, "cluster-size", "a power of two from 512 to 2M")
	cmd.Flags().IntVar(&c.version, "version", 3, "of the format, 2 or 3")
	cmd.Flags().IntVar(&c.refcountBits, "refcount-bits", 16, "width of a reference count, a power of two from 1 to 64; narrow ones limit the snapshots")
	cmd.Flags().BoolVar(&c.extendedL2, "extended-l2", false, "divide clusters (of 16K or more) into 32 subclusters")
}

// options returns what the flags say.
func (c *createFlags) options() (qcow2.CreateOptions, error) {
	o := qcow2.CreateOptions{
		ClusterSize: int64(c.clusterSize), Version: c.version, RefcountBits: c.refcountBits, ExtendedL2: c.extendedL2,
	}
	if c.preallocation == "" {
		return o, nil
	}
	var err error
	o.Preallocation, err = qcow2.ParsePreallocation(c.preallocation)
	return o, err
}

// create makes an image of size bytes and lets fill write it. It is at path when it is whole, and only then.
func (c *createFlags) create(ctx context.Context, path string, size int64, fill func(*qcow2.Image) error) (err error) {
	options, err := c.options()
	if err != nil {
		return err
	}
	whole, err := createNewFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, whole.close()) }()
	if err := writeImage(ctx, whole, roundUp(size, 512), options, fill); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return whole.keep()
}

// writeImage makes an image in a new file, which stays open.
func writeImage(ctx context.Context, whole *newFile, size int64, options qcow2.CreateOptions, fill func(*qcow2.Image) error) error {
	f, err := whole.file()
	if err != nil {
		return err
	}
	err = qcow2.Create(ctx, f, size, options)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{})
	if err != nil {
		return err
	}
	return errors.Join(fill(img), img.Close())
}

// roundUp returns the smallest multiple of unit that is at least n.
func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

func newImageCreateCommand() *cobra.Command {
	var flags createFlags
	cmd := &cobra.Command{
		Use:   "create FILE SIZE",
		Short: "Create an image that reads as zeros",
		Long: `Create an image of SIZE virtual bytes (rounded up to a multiple of 512, as QEMU does) that reads as
zeros. Without preallocation it occupies next to nothing until it is written. FILE must not exist.

Preallocation is QEMU's: metadata maps all of the disk to a sparse file, so that a write changes no
mapping; falloc also reserves the blocks, so that a write cannot meet a full file system; full also writes
zeros to them. What the guest discards later is given up, and after a snapshot writes need new blocks.`,
		Example: `  csi-qcow2 image create disk.qcow2 10G
  csi-qcow2 image create disk.qcow2 4T --cluster-size 1M
  csi-qcow2 image create disk.qcow2 10G --preallocation falloc`,
		Args: takes("FILE", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := sizeArgument(cmd, args[1])
			if err != nil {
				return err
			}
			return flags.create(cmd.Context(), args[0], size, func(*qcow2.Image) error { return nil })
		},
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&flags.preallocation, "preallocation", "off", "`off`, metadata, falloc or full")
	return cmd
}

func newImageResizeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resize FILE SIZE",
		Short: "Make an image larger",
		Long: `Make the active disk of an image SIZE bytes large, or with +SIZE larger by so many (rounded up to a multiple
of 512); the new part reads as zeros. Snapshots keep their own size. An image cannot be made smaller.`,
		Example: `  csi-qcow2 image resize disk.qcow2 20G
  csi-qcow2 image resize disk.qcow2 +512M`,
		Args: takes("FILE", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			number, more := strings.CutPrefix(args[1], "+")
			size, err := sizeArgument(cmd, number)
			if err != nil {
				return err
			}
			return withImage(args[0], false, func(img *qcow2.Image) error {
				if more {
					if size > math.MaxInt64-512-img.Size() {
						return fmt.Errorf("size %s is too large", args[1])
					}
					size += img.Size()
				}
				if size = roundUp(size, 512); size < img.Size() {
					return plainError{fmt.Sprintf("%s has %s, and an image cannot be made smaller: %s are asked for",
						printable(args[0]), humanSize(img.Size()), humanSize(size)), qcow2.ErrUnsupported}
				}
				return img.Resize(cmd.Context(), size)
			})
		},
	}
}

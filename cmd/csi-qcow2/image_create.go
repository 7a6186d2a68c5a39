package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

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

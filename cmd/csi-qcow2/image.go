package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageCommand() *cobra.Command {
	image := newGroup("image", "Work on a qcow2 image that is not in use",
		`Create, look at, check, convert and snapshot qcow2 images, versions 2 and 3. An image that QEMU or the
engine has open is refused.

Sizes are bytes, or have a suffix K, M, G, T, P (powers of 1024). Snapshots are meant by their name; if no
snapshot has that name, by their ID. So a snapshot whose name is a number is found before another one that
has this number as its ID (QEMU looks at the IDs first).`,
		newImageCreateCommand(), newImageInfoCommand(), newImageMapCommand(), newImageResizeCommand(),
		newImageCheckCommand(), newImageExportCommand(), newImageImportCommand(), newImageSnapshotCommand(), newImageIOCommand())
	image.Example = `  csi-qcow2 image create disk.qcow2 10G
  csi-qcow2 image import disk.raw disk.qcow2
  csi-qcow2 image snapshot create disk.qcow2 before-upgrade
  csi-qcow2 image snapshot goto disk.qcow2 before-upgrade
  csi-qcow2 image check disk.qcow2`
	return image
}

// withImage opens the image at path for work and closes it afterwards.
func withImage(path string, readOnly bool, work func(*qcow2.Image) error) (err error) {
	f, err := qcow2.OpenFile(path, readOnly)
	if err != nil {
		return err
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: readOnly})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	return work(img)
}

// findSnapshot returns the snapshot that has the name or, if there is none, the ID s.
func findSnapshot(img *qcow2.Image, s string) (qcow2.Selector, error) {
	for _, selector := range []qcow2.Selector{qcow2.ByName(s), qcow2.ByID(s)} {
		_, err := img.FindSnapshot(selector)
		if err == nil || !errors.Is(err, qcow2.ErrNotFound) {
			return selector, err
		}
	}
	return qcow2.Selector{}, fmt.Errorf("snapshot %s: %w", printable(s), qcow2.ErrNotFound)
}

// openView returns the content of the snapshot that s means, or the active content if s is empty.
func openView(img *qcow2.Image, s string) (*qcow2.View, error) {
	if s == "" {
		return img.Active(), nil
	}
	selector, err := findSnapshot(img, s)
	if err != nil {
		return nil, err
	}
	return img.OpenSnapshot(selector)
}

func addSnapshotFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("snapshot", "", "the `name` (or ID) of the snapshot to read; the active content without")
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

// options returns what the flags say. stop ends a preallocation early.
func (c *createFlags) options(stop func() error) (qcow2.CreateOptions, error) {
	o := qcow2.CreateOptions{
		ClusterSize: int64(c.clusterSize), Version: c.version, RefcountBits: c.refcountBits, ExtendedL2: c.extendedL2, Stop: stop,
	}
	if c.preallocation == "" {
		return o, nil
	}
	var err error
	o.Preallocation, err = qcow2.ParsePreallocation(c.preallocation)
	return o, err
}

// create makes an image of size bytes at path and lets fill write it. When anything fails, no image is left.
func (c *createFlags) create(ctx context.Context, path string, size int64, fill func(*qcow2.Image) error) (err error) {
	options, err := c.options(ctx.Err)
	if err != nil {
		return err
	}
	f, err := qcow2.CreateFile(path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	err = qcow2.Create(f, roundUp(size, 512), options)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{})
	if err != nil {
		return err
	}
	err = errors.Join(fill(img), img.Close())
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// roundUp returns the smallest multiple of unit that is at least n.
func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

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
			size, err := parseSize(args[1])
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
		Long: `Make the active disk of an image SIZE bytes large (rounded up to a multiple of 512); the new part reads as
zeros. Snapshots keep their own size. An image cannot be made smaller.`,
		Example: `  csi-qcow2 image resize disk.qcow2 20G`,
		Args:    takes("FILE", "SIZE"),
		RunE: func(_ *cobra.Command, args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return err
			}
			return withImage(args[0], false, func(img *qcow2.Image) error { return img.Resize(roundUp(size, 512)) })
		},
	}
}

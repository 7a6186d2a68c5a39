package main

import (
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

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

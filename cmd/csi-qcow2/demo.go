package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/cmd/csi-qcow2/demo"
)

func newDemoCommand() *cobra.Command {
	o := demo.Options{Version: version}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Play a volume's whole life on this machine",
		Long: `Start an engine and a CSI plugin on a temporary pool and play, over the CSI socket, what a user's objects
would cause in a cluster: create, mount, snapshot while files are written, restore, revert in place, expand,
delete; for a file system and for a raw block volume. Every file is compared. At the end QEMU's own tools say
what they think of the images. Nothing is left behind.

It needs root, loop devices, FUSE, mkfs.ext4 and qemu-img.`,
		Example: `  csi-qcow2 demo
  csi-qcow2 demo --pause --keep
  csi-qcow2 demo --dir /mnt/xfs --source /usr/share/doc`,
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if os.Geteuid() != 0 {
				return errors.New("the demonstration mounts file systems: run it as root")
			}
			if o.Program, err = os.Executable(); err != nil {
				return err
			}
			if o.Source == "" {
				if o.Source, err = goSource(cmd.Context()); err != nil {
					return err
				}
			}
			o.In, o.Out, o.Err = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			o.Colour = isTerminal(o.Out) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
			o.Width = widthOf(o.Out)
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Dir, "dir", "/var/tmp", "`directory`, on a disk, in which the temporary pool is made")
	cmd.Flags().BoolVar(&o.Pause, "pause", false, "wait for Enter before each step")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "start a shell to try things, before everything is taken down")
	cmd.Flags().StringVar(&o.Source, "source", "", "`directory` that is copied into the volume (default the Go toolchain's src)")
	return cmd
}

// goSource returns the directory of the Go toolchain's own source.
func goSource(ctx context.Context) (string, error) {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("where is Go's own source? (say --source DIR to copy another tree): %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(root)), "src"), nil
}

package main

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageCloneCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "clone SRC[@SNAPSHOT] DST",
		Short: "Make an image out of another, or of a snapshot of it",
		Long: `Make the image DST, which must not exist, with the content of SRC, or of one of its snapshots. It has no snapshots
and no backing file, and does not depend on SRC. Where the file system can (XFS, btrfs) both share their blocks
until one is written; elsewhere the data is copied. DST appears when it is whole.

If SRC@SNAPSHOT is the name of a file, it means that file. A snapshot of an image that is in use can be cloned as
it can be exported.`,
		Example: `  csi-qcow2 image clone disk.qcow2 copy.qcow2
  csi-qcow2 image clone disk.qcow2@before-upgrade old.qcow2`,
		Args: takes("SRC[@SNAPSHOT]", "DST"),
	}
	look := addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		path, snapshot := splitSource(args[0])
		chosen := &snapshotFlags{name: snapshot, given: path != args[0]}
		return withContent(cmd, path, chosen, look, func(c *content) error {
			p := newProgress(cmd.ErrOrStderr(), "cloning", args[0])
			defer p.end()
			return cloneTo(cmd.Context(), args[1], c, p)
		})
	}
	return cmd
}

// splitSource divides FILE@SNAPSHOT at its last @, unless there is a file of the whole name.
func splitSource(source string) (path, snapshot string) {
	if _, err := os.Lstat(source); err == nil {
		return source, ""
	}
	if i := strings.LastIndexByte(source, '@'); i > 0 {
		return source[:i], source[i+1:]
	}
	return source, ""
}

// cloneTo makes the image path out of a content. It is there when it is whole.
func cloneTo(ctx context.Context, path string, c *content, p *progress) (err error) {
	whole, err := createNewFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, whole.close()) }()
	f, err := whole.file()
	if err != nil {
		return err
	}
	err = qcow2.Clone(ctx, f, c.View, 0, p.update)
	if err = errors.Join(c.confirm(err), f.Close()); err != nil {
		return err
	}
	return whole.keep()
}

// file returns the new file as that of an image, which the caller closes.
func (n *newFile) file() (qcow2.File, error) {
	fd, err := unix.FcntlInt(n.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return qcow2.NewFile(os.NewFile(uintptr(fd), n.path), false)
}

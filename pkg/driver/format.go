package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// A volume is formatted if it is known to be empty, and only then: that nothing is recognised on it proves nothing. Its
// image says so, or a mark that it gets when it is made, or before its first format, and loses when anybody else may
// write to it.

// prepareFileSystem makes sure that the file system that a volume is to have is on its device, and sound.
func (n *node) prepareFileSystem(
	ctx context.Context, device blockDevice, v pool.Volume, fsType string, readOnly bool,
) error {
	p, err := n.pool()
	if err != nil {
		return err
	}
	note, unformatted, err := p.Marked(v.ID, pool.Unformatted)
	if err != nil {
		return err
	}
	found := ""
	if begun := unformatted && len(note) > 0; !begun { // else there may be half a file system
		if found, err = n.recognise(device); err != nil {
			return err
		}
	}
	switch {
	case found == fsType:
		return n.checkFileSystem(ctx, device, fsType, readOnly)
	case found != "":
		return refuse(errPrecondition, "the volume holds %s, not %s; it is not formatted", found, fsType)
	}
	if !unformatted {
		if err := n.knownBlank(ctx, device, v); err != nil {
			return err
		}
	}
	if readOnly {
		return refuse(errPrecondition, "the volume is blank, and read-only")
	}
	if err := p.Mark(v.ID, pool.Unformatted, []byte(fsType)); err != nil {
		return err
	}
	return n.format(device, fsType)
}

// recognise returns what is on a device, in blkid's words; "" if it knows nothing of it, or cannot read it.
func (n *node) recognise(device blockDevice) (string, error) {
	const nothing, ambivalent = 2, 8
	o, err := n.programs.run(program{
		device: device.path, limit: quick,
		command: []string{"blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device.path},
	})
	switch {
	case err != nil:
		return "", err
	case o.status == nothing:
		return "", nil
	case o.status == ambivalent:
		return "several things at once", nil
	case o.status != 0:
		return "", o.err()
	}
	var fsType, partitions string
	for line := range strings.Lines(o.output) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "TYPE":
			fsType = value
		case "PTTYPE":
			partitions = "a partition table (" + value + ")"
		}
	}
	return cmp.Or(fsType, partitions, "something that blkid has no name for"), nil
}

// knownBlank is nil if nobody has written to a volume on whose device nothing was recognised, and else says what is known.
func (n *node) knownBlank(ctx context.Context, device blockDevice, v pool.Volume) error {
	blank, err := n.engine.Blank(ctx, v.ID)
	if err != nil {
		return err
	}
	if blank && v.Source == "" {
		return nil
	}
	unreadable := device.readEnds()
	attached, err := n.engine.Attachment(ctx, v.ID) // after it: what has been met is told
	if err != nil {
		return err
	}
	switch {
	case attached.Corrupt:
		return errors.Join(fmt.Errorf("no file system is recognised on the volume, and it is not formatted: %w: "+
			"`csi-qcow2 image check` tells what is wrong", qcow2.ErrCorrupt), unreadable)
	case unreadable != nil:
		return fmt.Errorf("no file system is recognised on the volume, which cannot be read, and it is not formatted: %w: "+
			"detach it, and let `csi-qcow2 image check` look at it", unreadable)
	case blank:
		return refuse(errPrecondition, "the volume holds nothing, though it is a copy of %s, of which that is not known; it is not formatted", v.Source)
	}
	return refuse(errPrecondition, "the volume holds, or held, data in which no file system is recognised; it is not formatted. "+
		"If it is to be a block device, claim it with volumeMode Block; if nothing of it is needed, delete the claim and make another")
}

// readEnds reads where file systems have their superblocks.
func (b blockDevice) readEnds() error {
	file, err := os.Open(b.path)
	if err != nil {
		return err
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	buf := make([]byte, 128<<10)
	for _, off := range []int64{0, max(0, size-int64(len(buf)))} {
		if _, err := file.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	return nil
}

// format makes a file system on a device that is known to be empty: there is nothing to discard, and nothing to ask.
func (n *node) format(device blockDevice, fsType string) error {
	command := []string{"mkfs." + fsType, "-F", "-m0", "-E", "nodiscard", device.path}
	if fsType == fsXFS {
		command = []string{"mkfs.xfs", "-f", "-K", device.path}
	}
	return n.programs.mustRun(program{device: device.path, limit: thorough, command: command})
}

// endFormat says, durably, that somebody else than mkfs may write to a volume from now on.
func (n *node) endFormat(id string) error {
	p, err := n.pool()
	if err != nil {
		return err
	}
	if _, unformatted, err := p.Marked(id, pool.Unformatted); err != nil || !unformatted {
		return err
	}
	return p.Unmark(id, pool.Unformatted)
}

// neverWritten tells whether it is known that nobody has written to a volume, or to what it is a copy of.
func (c *controller) neverWritten(ctx context.Context, p *pool.Pool, v pool.Volume) bool {
	_, unformatted, err := p.Marked(v.ID, pool.Unformatted)
	if unformatted || err != nil || v.Source != "" {
		return unformatted
	}
	blank := false
	err = wherever(func() (err error) {
		blank, err = c.engine.Blank(ctx, v.ID)
		return err
	}, func() error {
		return c.images.read(ctx, p, v.ID, func(image *qcow2.Image) (err error) {
			blank, err = image.Blank()
			return err
		})
	})
	if err != nil {
		klog.FromContext(ctx).Error(err, "It is not known whether the volume is empty", "volume", v.ID)
	}
	return blank && err == nil
}

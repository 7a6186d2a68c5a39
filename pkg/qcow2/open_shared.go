package qcow2

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// sharedAttempts is how often an image that its writer keeps changing is read before that is an error.
const sharedAttempts = 20

// OpenShared opens the image at path for reading, whoever has it open: no lock is taken or looked at. What it reads of the
// active disk may be older than what its writer knows, and a mixture. A snapshot reads as itself as long as it is not deleted:
// after reading one, SnapshotKept tells. ErrInUse if the image changes faster than it can be opened.
func OpenShared(path string) (*Image, error) {
	var failure error
	for range sharedAttempts {
		img, err := openSharedOnce(path)
		if err == nil {
			var changed bool
			if changed, err = img.Changed(); err == nil && !changed {
				return img, nil
			}
			err = errors.Join(err, img.Close())
		} else if !errors.Is(err, ErrCorrupt) { // which it may be only because it was read while it was changed
			return nil, err
		}
		failure = err
	}
	if failure == nil {
		failure = fmt.Errorf("open %s: it is changed all the time: %w", path, ErrInUse)
	}
	return nil, failure
}

func openSharedOnce(path string) (*Image, error) {
	f, err := host.OpenUnlocked(path)
	if err != nil {
		return nil, err
	}
	return Open(f, OpenOptions{ReadOnly: true})
}

// Changed tells whether the image in the file is of another state than when it was opened: each operation on snapshots or on the
// size switches the header.
func (img *Image) Changed() (bool, error) {
	now, err := format.ReadHeader(img.f, format.DecodeHeader)
	if err != nil {
		return false, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	return !bytes.Equal(now.Encode(), img.hdr.Load().Encode()), nil
}

// SnapshotKept tells whether a snapshot that an image of OpenShared has listed is still in the image at path, whoever has it open. As long as it is, none of
// its clusters has been used for anything else.
func SnapshotKept(path string, s Snapshot) (kept bool, err error) {
	img, err := OpenShared(path)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	now, err := img.FindSnapshot(ByIDAndName(s.ID, s.Name))
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil && now.Date.Equal(s.Date), err
}

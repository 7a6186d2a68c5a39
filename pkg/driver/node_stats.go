package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// NodeGetVolumeStats returns what a file system has of bytes and inodes, or the size of a block volume.
func (n *node) NodeGetVolumeStats(
	ctx context.Context, req *csi.NodeGetVolumeStatsRequest,
) (*csi.NodeGetVolumeStatsResponse, error) {
	id, path := req.GetVolumeId(), req.GetVolumePath()
	if err := cmp.Or(required("volume_id", id), required("volume_path", path)); err != nil {
		return nil, err
	}
	at, err := n.volumeAt(ctx, id, path)
	if err != nil {
		return nil, err
	}
	defer at.device.close()
	if at.block {
		size, err := at.device.size()
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: size}}}, err
	}
	usage, err := fileSystemUsage(path)
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, err
}

func fileSystemUsage(path string) ([]*csi.VolumeUsage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return []*csi.VolumeUsage{
		{
			Unit:      csi.VolumeUsage_BYTES,
			Total:     int64(st.Blocks) * st.Bsize,
			Available: int64(st.Bavail) * st.Bsize,
			Used:      int64(st.Blocks-st.Bfree) * st.Bsize,
		}, {
			Unit:      csi.VolumeUsage_INODES,
			Total:     int64(st.Files),
			Available: int64(st.Ffree),
			Used:      int64(st.Files - st.Ffree),
		},
	}, nil
}

// located is a volume that is staged or published at a path.
type located struct {
	device blockDevice
	block  bool
}

// volumeAt finds a volume at a path. errNotFound if it is not there. The caller closes the device.
func (n *node) volumeAt(ctx context.Context, id, path string) (located, error) {
	p, err := n.pool()
	if err != nil {
		return located{}, err
	}
	if _, err := liveVolume(p, id); err != nil {
		return located{}, err
	}
	missing := fmt.Errorf("volume %s %w at %q", id, errNotFound, path)
	if !filepath.IsAbs(path) {
		return located{}, missing
	}
	a, err := n.engine.Attachment(ctx, id)
	switch {
	case errors.Is(err, engine.ErrNotAttached):
		return located{}, missing
	case err != nil:
		return located{}, err
	}
	device, err := servedDevice(a)
	if err != nil {
		return located{}, err
	}
	if path == device.path {
		return located{device: device, block: true}, nil
	}
	at, err := mountAt(path)
	switch {
	case err != nil:
	case at == nil:
		err = missing
	case at.isNodeOf(device):
		return located{device: device, block: true}, nil
	case at.dev == device.rdev:
		return located{device: device}, nil
	default:
		err = missing
	}
	device.close()
	return located{}, err
}

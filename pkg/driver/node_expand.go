package driver

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// NodeExpandVolume makes a volume larger while it is used: image, device, and file system.
func (n *node) NodeExpandVolume(
	ctx context.Context, req *csi.NodeExpandVolumeRequest,
) (*csi.NodeExpandVolumeResponse, error) {
	id, path := req.GetVolumeId(), req.GetVolumePath()
	if err := cmp.Or(required("volume_id", id), required("volume_path", path)); err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		if err := checkCapability(req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	want, err := newSizeRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	v, release, err := n.hold(id)
	if err != nil {
		return nil, err
	}
	defer release()
	at, err := n.volumeAt(ctx, id, path)
	if err != nil {
		return nil, err
	}
	defer at.device.close()
	size, err := n.expandDevice(ctx, v, at.device, want)
	if err != nil {
		return nil, fmt.Errorf("expand volume %s: %w", id, err)
	}
	if !at.block {
		if err := n.expandFileSystem(at.device); err != nil {
			return nil, fmt.Errorf("expand volume %s: %w", id, err)
		}
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

// expandDevice returns the size that the volume has then, in bytes. One that is large enough stays.
func (n *node) expandDevice(ctx context.Context, v pool.Volume, device blockDevice, want sizeRange) (int64, error) {
	size, err := device.size()
	if err != nil {
		return 0, err
	}
	if want.required <= size && (want.limit == 0 || want.limit >= size) {
		return size, nil
	}
	target, err := want.choose(size, size, maxSize(recordedParameters(v.Parameters).clusterSize))
	if err != nil {
		return 0, err
	}
	p, err := n.pool()
	if err != nil {
		return 0, err
	}
	done, err := n.capacity.promise(p, v.ID, size, target)
	if err != nil {
		return 0, err
	}
	defer done()
	return n.engine.Resize(ctx, v.ID, target, want.required)
}

// expandFileSystem grows the file system on a device. It takes a mount that can be written; if there is none,
// the file system grows when it is staged so.
func (n *node) expandFileSystem(device blockDevice) error {
	at, err := device.fileSystemMounts()
	if err != nil {
		return err
	}
	at = slices.DeleteFunc(at, func(m mountPoint) bool { return m.readOnly || m.superRO })
	if len(at) == 0 {
		return nil
	}
	return n.growFileSystem(device, at[0])
}

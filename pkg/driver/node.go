package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

type node struct {
	csi.UnimplementedNodeServer
	*Driver
}

func (n *node) NodeGetCapabilities(
	context.Context, *csi.NodeGetCapabilitiesRequest,
) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, capability := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: capability}},
		})
	}
	return resp, nil
}

func (n *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: n.nodeID, AccessibleTopology: n.topology()}, nil
}

// hold returns a volume for an operation on its mounts, alone until release is called.
func (n *node) hold(id string) (v pool.Volume, release func(), err error) {
	p, err := n.pool()
	if err != nil {
		return v, nil, err
	}
	if v, err = liveVolume(p, id); err != nil {
		return v, nil, err
	}
	release, err = n.busy.acquire("node volume " + id)
	return v, release, err
}

// NodeStageVolume attaches a volume, and mounts it unless it is to be a block device. A blank one is
// formatted, a file system smaller than its volume grown.
func (n *node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	id, capability := req.GetVolumeId(), req.GetVolumeCapability()
	err := cmp.Or(
		required("volume_id", id), checkPath("staging_target_path", req.GetStagingTargetPath()), checkCapability(capability))
	if err != nil {
		return nil, err
	}
	v, release, err := n.hold(id)
	if err != nil {
		return nil, err
	}
	defer release()
	device, attachedNow, err := n.attach(ctx, id)
	if err != nil {
		return nil, err
	}
	if capability.GetBlock() != nil {
		return &csi.NodeStageVolumeResponse{}, n.endFormat(id)
	}
	if err := n.stageFileSystem(ctx, device, req.GetStagingTargetPath(), v, capability); err != nil {
		if attachedNow {
			n.detachAfterFailure(ctx, id)
		}
		return nil, fmt.Errorf("stage volume %s: %w", id, err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// attach has the engine serve a volume, whose image nobody in this process has open meanwhile. now is false if
// the volume was attached before.
func (n *node) attach(ctx context.Context, id string) (device blockDevice, now bool, err error) {
	letGo, err := n.images.claim(ctx, id)
	if err != nil {
		return device, false, err
	}
	defer letGo()
	before, err := n.attachments(ctx)
	if err != nil {
		return device, false, err
	}
	path, err := n.engine.Attach(ctx, id)
	if err != nil {
		return device, false, fmt.Errorf("attach volume %s: %w", id, err)
	}
	device, err = newBlockDevice(path)
	_, was := before[id]
	return device, !was, err
}

// detachAfterFailure gives the volume back: nobody calls NodeUnstageVolume for a volume that was never staged.
func (n *node) detachAfterFailure(ctx context.Context, id string) {
	if err := n.engine.Detach(context.WithoutCancel(ctx), id); err != nil {
		klog.FromContext(ctx).Error(err, "The volume stays attached", "volume", id)
	}
}

// stageFileSystem makes sure that the device is mounted at path.
func (n *node) stageFileSystem(
	ctx context.Context, device blockDevice, path string, v pool.Volume, c *csi.VolumeCapability,
) error {
	options, readOnly := mountOptions(c)
	fsType := stagedFS(c, recordedParameters(v.Parameters))
	staged, err := n.stagedMount(ctx, device, path)
	if err != nil {
		return err
	}
	switch {
	case staged == nil:
		if used, err := device.nodeMounts(); err != nil || len(used) > 0 {
			return cmp.Or(err, fmt.Errorf("%w: the volume is in use as a block device", errPrecondition))
		}
		if err := os.MkdirAll(path, 0o750); err != nil {
			return err
		}
		if err := n.prepareFileSystem(ctx, device, v, fsType, readOnly); err != nil {
			return err
		}
		if err := n.mountDevice(device, path, fsType, options, readOnly); err != nil {
			return err
		}
		staged = &mountPoint{path: path, fsType: fsType}
	case staged.fsType != fsType || staged.readOnly != readOnly:
		return fmt.Errorf("a mount of the volume at %s %w: %s, read-only %v", path, errExists, staged.fsType, staged.readOnly)
	}
	if readOnly {
		return nil
	}
	if err := n.endFormat(v.ID); err != nil {
		return err
	}
	return n.growFileSystem(device, *staged) // also when a call before came only as far as the mount
}

// stagedMount returns the mount of a device at a staging path, or nil. Mounts whose device died, with the
// engine, are removed.
func (n *node) stagedMount(ctx context.Context, device blockDevice, path string) (*mountPoint, error) {
	for {
		m, err := mountAt(path)
		if err != nil || m == nil || m.dev == device.rdev {
			return m, err
		}
		if err := n.unmountStale(ctx, *m); err != nil {
			return nil, err
		}
	}
}

// NodeUnstageVolume unmounts and detaches a volume; one that is gone, too.
func (n *node) NodeUnstageVolume(
	ctx context.Context, req *csi.NodeUnstageVolumeRequest,
) (*csi.NodeUnstageVolumeResponse, error) {
	id, path := req.GetVolumeId(), req.GetStagingTargetPath()
	if err := cmp.Or(required("volume_id", id), checkPath("staging_target_path", path)); err != nil {
		return nil, err
	}
	release, err := n.busy.acquire("node volume " + id)
	if err != nil {
		return nil, err
	}
	defer release()
	if device, err := n.attachedDevice(ctx, id); err == nil {
		if err := checkUnpublished(device, path); err != nil {
			return nil, fmt.Errorf("unstage volume %s: %w", id, err)
		}
	}
	if err := n.unmountAll(path); err != nil {
		return nil, err
	}
	if !pool.ValidID(id) {
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	if err := n.engine.Detach(ctx, id); err != nil && !errors.Is(err, pool.ErrNotFound) {
		return nil, fmt.Errorf("detach volume %s: %w", id, err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// checkUnpublished is errPrecondition while a device is mounted anywhere but at its staging path.
func checkUnpublished(device blockDevice, staging string) error {
	fileSystem, err := device.fileSystemMounts()
	if err != nil {
		return err
	}
	nodes, err := device.nodeMounts()
	if err != nil {
		return err
	}
	staged, err := resolve(staging)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if at := withoutPath(append(fileSystem, nodes...), staged); len(at) > 0 {
		return fmt.Errorf("%w: the volume is published at %s", errPrecondition, at[0].path)
	}
	return nil
}

package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// detachPatience is how long a failed call waits for the device that it gives back.
const detachPatience = 5 * time.Second

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
	return &csi.NodeGetInfoResponse{
		NodeId: n.nodeID, AccessibleTopology: n.topology(), MaxVolumesPerNode: n.maxVolumes,
	}, nil
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
// formatted, a file system smaller than its volume grown. What a call that fails has made, it undoes: nobody unstages a
// volume that was never staged.
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
	if err := checkMode(v, capability, req.GetVolumeContext()); err != nil {
		return nil, err
	}
	device, attachedNow, err := n.attach(ctx, id)
	if err != nil {
		return nil, err
	}
	defer device.close()
	n.keepSize(ctx, device, v)
	if capability.GetBlock() != nil {
		err = n.stageBlock(device, v)
	} else {
		err = n.stageFileSystem(ctx, device, req.GetStagingTargetPath(), v, capability)
	}
	if err != nil {
		if attachedNow {
			device.close()
			n.detachAfterFailure(ctx, id)
		}
		return nil, fmt.Errorf("stage volume %s: %w", id, err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// stageBlock lets a volume be written to by whoever gets its device.
func (n *node) stageBlock(device blockDevice, v pool.Volume) error {
	if err := refuseMounted(device); err != nil {
		return err
	}
	return n.endFormat(v.ID)
}

// refuseMounted is errPrecondition if a device is mounted: who wrote to it beside its file system would destroy that.
func refuseMounted(device blockDevice) error {
	at, err := device.fileSystemMounts()
	if err == nil && len(at) > 0 {
		err = refuse(errPrecondition, "the volume is in use as a file system, at %s", at[0].path)
	}
	return err
}

// keepSize gives a volume the size back that a revert has taken. Where that fails, the pool is full for example, the volume
// is usable as it is, and the next staging tries again.
func (n *node) keepSize(ctx context.Context, device blockDevice, v pool.Volume) {
	size, err := device.size()
	if err == nil && size < v.LeastSize() {
		_, err = n.engine.Resize(ctx, v.ID, v.LeastSize(), v.LeastSize())
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "The volume is smaller than it was", "volume", v.ID, "size", size, "was", v.LeastSize())
	}
}

// attach has the engine serve a volume, whose image nobody in this process has open meanwhile. now is false if
// the volume was attached before. The caller closes the device.
func (n *node) attach(ctx context.Context, id string) (device blockDevice, now bool, err error) {
	letGo, err := n.images.claim(ctx, id)
	if err != nil {
		return device, false, err
	}
	defer letGo()
	_, err = n.engine.Attachment(ctx, id)
	was := err == nil
	if err != nil && !errors.Is(err, engine.ErrNotAttached) {
		return device, false, err
	}
	bound, err := boundLoops()
	if err != nil {
		return device, false, err
	}
	attached, err := n.engine.Attach(ctx, id, bound...)
	if err != nil {
		return device, false, fmt.Errorf("attach volume %s: %w", id, err)
	}
	device, err = openDevice(attached)
	return device, !was, err
}

// detachAfterFailure gives the volume back. The kernel, or udev, may have its device open for a moment.
func (n *node) detachAfterFailure(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachPatience)
	defer cancel()
	tick := time.NewTicker(detachPatience / 50)
	defer tick.Stop()
	for {
		err := n.engine.Detach(ctx, id)
		if errors.Is(err, engine.ErrInUse) {
			select {
			case <-tick.C:
				continue
			case <-ctx.Done():
			}
		}
		if err != nil {
			klog.FromContext(ctx).Error(err, "The volume stays attached", "volume", id)
		}
		return
	}
}

// stageFileSystem makes sure that the device is mounted at path.
func (n *node) stageFileSystem(
	ctx context.Context, device blockDevice, path string, v pool.Volume, c *csi.VolumeCapability,
) (err error) {
	readOnly := isReadOnly(c)
	fsType := stagedFS(c, recordedParameters(v.Parameters))
	staged, err := n.stagedMount(ctx, device, path)
	if err != nil {
		return err
	}
	switch {
	case staged == nil:
		if err := n.notElsewhere(device, path, v.ID); err != nil {
			return err
		}
		if err := os.MkdirAll(path, 0o750); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, n.unmountAll(path))
			}
		}()
		if err := n.prepareFileSystem(ctx, device, v, fsType, readOnly); err != nil {
			return err
		}
		if err := n.mountDevice(device, path, fsType, mountOptions(c, fsType)); err != nil {
			return err
		}
		if staged, err = n.stagedMount(ctx, device, path); err != nil {
			return err
		}
		if staged == nil {
			return fmt.Errorf("%s is not mounted at %s though mount(8) says so", device.path, path)
		}
	case staged.fsType != fsType || staged.readOnly != readOnly:
		return fmt.Errorf("a mount of the volume at %s %w: %s, read-only %v", path, errExists, staged.fsType, staged.readOnly)
	}
	if readOnly {
		return nil
	}
	if err := n.endFormat(v.ID); err != nil {
		return err
	}
	// Also when a call before came only as far as the mount.
	if err := n.growFileSystem(device, *staged); err != nil {
		// The volume can be used as it is. Health says that it is small, and the next staging or expansion tries again.
		klog.FromContext(ctx).Error(err, "The file system does not grow", "volume", v.ID)
	}
	return nil
}

// notElsewhere is errPrecondition if a device is in use as one. If it is mounted elsewhere, path is noted: kubelet may
// stage a volume at two paths, an old version's and a new one's.
func (n *node) notElsewhere(device blockDevice, path, id string) error {
	if used, err := device.nodeMounts(); err != nil {
		return err
	} else if len(used) > 0 {
		return refuse(errPrecondition, "the volume is in use as a block device: %s is bound to %s", device.path, used[0].path)
	}
	others, err := device.fileSystemMounts()
	if err != nil {
		return err
	}
	if len(others) == 0 { // what is noted is of before the node's last start
		return n.changeExtraStaging(id, func([]string) []string { return nil })
	}
	at, err := resolve(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.changeExtraStaging(id, func(paths []string) []string { return append(paths, at) })
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
	device, err := n.attachedDevice(ctx, id)
	attached := err == nil
	if attached {
		device.close() // what follows looks at mounts only
		if err := n.checkUnpublished(device, path, id); err != nil {
			return nil, fmt.Errorf("unstage volume %s: %w", id, err)
		}
	}
	if err := n.unmountAll(path); err != nil {
		return nil, err
	}
	if attached {
		if again, err := n.stagedElsewhere(device, path, id); err != nil || again {
			return &csi.NodeUnstageVolumeResponse{}, err
		}
	}
	if !pool.ValidID(id) {
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	if err := n.engine.Detach(ctx, id); err != nil && !errors.Is(err, pool.ErrNotFound) {
		return nil, fmt.Errorf("detach volume %s: %w", id, err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

type controller struct {
	csi.UnimplementedControllerServer
	*Driver
}

func (c *controller) ControllerGetCapabilities(
	context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, capability := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: capability}},
		})
	}
	return resp, nil
}

// CreateVolume makes a volume, or returns the one of that name.
func (c *controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	request, err := newVolumeRequest(req)
	if err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	if err := c.checkTopology(req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	v, err := c.creating.join(ctx, request, func(ctx context.Context) (pool.Volume, error) {
		return c.createVolume(ctx, p, request)
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: c.volumeMessage(v, v.Size)}, nil
}

// DeleteVolume removes a volume. Its snapshots outlive it: as long as there is one, the volume stays as a
// tombstone.
func (c *controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	id := req.GetVolumeId()
	if err := required("volume_id", id); err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	if _, err := ownVolume(p, id); isNotFound(err) {
		return &csi.DeleteVolumeResponse{}, nil // also an ID that no driver of ours has made
	} else if err != nil {
		return nil, err
	}
	release, err := c.holdUnstaged(ctx, id)
	if err != nil {
		return nil, err
	}
	defer release()
	defer refillReserve(ctx, p)
	if err := c.images.change(ctx, p, id, func(lease *pool.Lease) error { return deleteVolume(ctx, lease) }); err != nil && !errors.Is(err, pool.ErrNotFound) {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// holdUnstaged keeps other operations off a volume that is not in use on this node. errPrecondition if it is.
func (c *controller) holdUnstaged(ctx context.Context, id string) (release func(), err error) {
	releaseVolume, err := c.busy.acquire("volume " + id)
	if err != nil {
		return nil, err
	}
	releaseNode, err := c.busy.acquire("node volume " + id)
	if err != nil {
		releaseVolume()
		return nil, err
	}
	release = func() { releaseNode(); releaseVolume() }
	switch a, err := c.engine.Attachment(ctx, id); {
	case errors.Is(err, engine.ErrNotAttached):
		return release, nil
	case err == nil:
		err = refuse(errPrecondition, "volume %s is in use as %s: end the pods that use it", id, a.Device)
		fallthrough
	default:
		release()
		return nil, err
	}
}

// deleteVolume removes a volume, or makes it a tombstone. The mark comes first: from then on nobody uses the
// content that is dropped, and a repeated delete finishes the work.
func deleteVolume(ctx context.Context, lease *pool.Lease) error {
	keep := false
	err := changeImage(ctx, lease, func(ctx context.Context, image *qcow2.Image) error {
		if keep = len(listed(whole(image.Snapshots()))) > 0; !keep {
			return nil
		}
		if err := lease.Update(func(v *pool.Volume) { v.Tombstone = true }); err != nil {
			return fmt.Errorf("mark volume %s as deleted: %w", lease.Volume().ID, err)
		}
		return image.DropActive(ctx)
	})
	if err != nil || keep {
		return err
	}
	return lease.Remove()
}

// ValidateVolumeCapabilities confirms what CreateVolume would have taken for this volume.
func (c *controller) ValidateVolumeCapabilities(
	_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("volume_capabilities are missing")
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	v, err := liveVolume(p, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if objection := validate(v, req); objection != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: objection.Error()}, nil //nolint:nilerr // it is the answer
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
	}}, nil
}

func validate(v pool.Volume, req *csi.ValidateVolumeCapabilitiesRequest) error {
	params, err := parseVolumeParameters(req.GetParameters())
	switch {
	case err != nil:
		return err
	case !params.match(v):
		return invalid("the volume has the parameters %v", v.Parameters)
	case len(req.GetMutableParameters()) > 0:
		return invalid("there are no mutable parameters")
	}
	for key := range req.GetVolumeContext() {
		if key != attributeModeChange {
			return invalid("the volume has no attribute %q", key)
		}
	}
	for _, c := range req.GetVolumeCapabilities() {
		if err := checkMode(v, c, req.GetVolumeContext()); err != nil {
			return err
		}
	}
	return checkCapabilities(req.GetVolumeCapabilities())
}

func (c *controller) ControllerGetVolume(
	ctx context.Context, req *csi.ControllerGetVolumeRequest,
) (*csi.ControllerGetVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	v, err := liveVolume(p, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	size, err := c.volumeSize(ctx, p, v)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: c.volumeMessage(v, size),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{},
	}, nil
}

// ListVolumes returns the volumes in the order of their IDs, tombstones left out.
func (c *controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	page, err := newPage("volume", req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	volumes, err := c.volumes(ctx, p)
	if err != nil {
		return nil, err
	}
	attached, err := c.attachments(ctx)
	if err != nil { // what there is does not depend on the engine
		klog.FromContext(ctx).V(4).Info("Volumes in use are listed with their last known sizes", "err", err)
	}
	resp := &csi.ListVolumesResponse{}
	for _, v := range volumes {
		if v.Tombstone || v.ID <= page.after {
			continue
		}
		if !page.takes(v.ID) {
			break
		}
		size := attached[v.ID].Size
		if size == 0 {
			if size, err = c.detachedSize(ctx, p, v); err != nil { // one that is busy, or broken, hides no other
				klog.FromContext(ctx).V(4).Info("Volume is listed with its last known size", "volume", v.ID, "err", err)
			}
		}
		size = max(size, v.LeastSize())
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: c.volumeMessage(v, size),
			Status: &csi.ListVolumesResponse_VolumeStatus{},
		})
	}
	resp.NextToken = page.next
	return resp, nil
}

// volumes returns the pool's volumes sorted by ID, tombstones too. Those whose description is broken
// are only logged.
func (c *controller) volumes(ctx context.Context, p *pool.Pool) ([]pool.Volume, error) {
	volumes, err := p.Volumes()
	if errors.Is(err, pool.ErrNotReady) {
		return nil, err
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "Volumes are left out")
	}
	return volumes, nil
}

// volumeSize returns a volume's size now, in bytes: it may have been expanded. After a revert it is that which it gets back
// when it is staged.
func (d *Driver) volumeSize(ctx context.Context, p *pool.Pool, v pool.Volume) (size int64, err error) {
	err = wherever(func() error {
		size, err = d.attachedSize(ctx, v.ID)
		return err
	}, func() error {
		size, err = d.detachedSize(ctx, p, v)
		return err
	})
	return max(size, v.LeastSize()), err
}

// detachedSize returns the size that the image of a volume has which is not attached. pool.ErrInUse.
func (d *Driver) detachedSize(ctx context.Context, p *pool.Pool, v pool.Volume) (size int64, err error) {
	err = d.images.read(ctx, p, v.ID, func(image *qcow2.Image) error {
		size = image.Size()
		return nil
	})
	return size, err
}

func (c *controller) volumeMessage(v pool.Volume, size int64) *csi.Volume {
	return &csi.Volume{
		VolumeId:           v.ID,
		CapacityBytes:      size,
		ContentSource:      contentSourceMessage(v.Source),
		AccessibleTopology: []*csi.Topology{c.topology()},
	}
}

func isNotFound(err error) bool {
	return errors.Is(err, errNotFound) || errors.Is(err, pool.ErrNotFound) || errors.Is(err, qcow2.ErrNotFound)
}

package driver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver/cluster"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A volume lives on one node, so this node's controller says of its volumes what the node does. The node also looks at the
// file system that is mounted.

// ControllerGetVolumeHealth tells what is wrong with a volume.
func (c *controller) ControllerGetVolumeHealth(
	ctx context.Context, req *csi.ControllerGetVolumeHealthRequest,
) (*csi.ControllerGetVolumeHealthResponse, error) {
	health, _, err := c.volumeHealth(ctx, req.GetVolumeId())
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: health}, err
}

// ControllerListVolumeHealth tells what is wrong with the volumes that something is wrong with.
func (c *controller) ControllerListVolumeHealth(
	ctx context.Context, req *csi.ControllerListVolumeHealthRequest,
) (*csi.ControllerListVolumeHealthResponse, error) {
	page, err := newPage("health", req.GetMaxEntries(), req.GetStartingToken())
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
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerListVolumeHealthResponse{}
	for _, v := range volumes {
		if v.Tombstone || v.ID <= page.after {
			continue
		}
		conditions := conditionsOf(p, v.ID, attached[v.ID])
		if len(conditions) == 0 {
			continue
		}
		if !page.takes(v.ID) {
			break
		}
		resp.Entries = append(resp.Entries, &csi.VolumeHealth{VolumeId: v.ID, HealthStatuses: conditions})
	}
	resp.NextToken = page.next
	return resp, nil
}

// NodeGetVolumeHealth tells what is wrong with a volume, or with the file system on it.
func (n *node) NodeGetVolumeHealth(
	ctx context.Context, req *csi.NodeGetVolumeHealthRequest,
) (*csi.NodeGetVolumeHealthResponse, error) {
	for _, path := range []string{req.GetVolumePublishPath(), req.GetStagingTargetPath()} {
		if path != "" && !filepath.IsAbs(path) {
			return nil, invalid("path %q is not absolute", path)
		}
	}
	health, a, err := n.volumeHealth(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if a.Device == "" || a.State != engine.Served {
		return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
	}
	device, err := servedDevice(a)
	if err != nil {
		health.HealthStatuses = append(health.HealthStatuses,
			condition(csi.VolumeHealthErrorType_INACCESSIBLE, "DeviceLost", err.Error()))
	} else {
		defer device.close()
		at, err := device.fileSystemMounts()
		if err != nil {
			return nil, err
		}
		if len(at) > 0 && a.State == engine.Served && small(device, at[0]) {
			health.HealthStatuses = append(health.HealthStatuses, condition(csi.VolumeHealthErrorType_DEGRADED, "FileSystemSmall",
				"the "+at[0].fsType+" file system is smaller than its volume: it could not be grown, which the next staging tries again"))
		}
		for _, m := range at {
			if m.superRO && !m.readOnly {
				health.HealthStatuses = append(health.HealthStatuses, condition(csi.VolumeHealthErrorType_DEGRADED, "FileSystemReadOnly",
					"the kernel has made the "+m.fsType+" file system read-only, after errors"))
				break
			}
		}
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
}

// volumeHealth also returns the volume's attachment, if it has one.
func (d *Driver) volumeHealth(ctx context.Context, id string) (*csi.VolumeHealth, engine.Attachment, error) {
	if err := required("volume_id", id); err != nil {
		return nil, engine.Attachment{}, err
	}
	p, err := d.pool()
	if err != nil {
		return nil, engine.Attachment{}, err
	}
	if _, err := liveVolume(p, id); err != nil {
		return nil, engine.Attachment{}, err
	}
	a, err := d.engine.Attachment(ctx, id)
	if err != nil && !errors.Is(err, engine.ErrNotAttached) {
		return nil, engine.Attachment{}, err
	}
	return &csi.VolumeHealth{VolumeId: id, HealthStatuses: conditionsOf(p, id, a)}, a, nil
}

// conditionsOf returns what is wrong with a volume, whose attachment is a if it has one.
func conditionsOf(p *pool.Pool, id string, a engine.Attachment) []*csi.VolumeHealth_VolumeHealthEntry {
	var out []*csi.VolumeHealth_VolumeHealthEntry
	switch a.State {
	case engine.Served:
	case engine.Failed:
		out = append(out, condition(csi.VolumeHealthErrorType_INACCESSIBLE, "VolumeFailed",
			"the volume's users get I/O errors: "+a.Failure+". End the pods that use it, so that it is staged again"))
	case engine.Replacing:
		out = append(out, condition(csi.VolumeHealthErrorType_DEGRADED, "WorkerReplaced",
			"the volume's users wait for another worker: "+a.Failure))
	case engine.Stalled:
		out = append(out, condition(csi.VolumeHealthErrorType_INACCESSIBLE, "IOStalled", "the volume's users wait: "+a.Failure))
	}
	if a.Corrupt {
		out = append(out, condition(csi.VolumeHealthErrorType_DATA_LOSS, "ImageCorrupt",
			"the image's metadata contradicts itself: what is sound can be read, nothing is written"))
	}
	if _, err := os.Stat(p.ImagePath(id)); errors.Is(err, fs.ErrNotExist) {
		out = append(out, condition(csi.VolumeHealthErrorType_DATA_LOSS, "ImageMissing", "the volume's image is gone"))
	}
	return out
}

// attachedVolumes returns what the cluster is told of the volumes in use.
func (d *Driver) attachedVolumes(ctx context.Context) ([]cluster.Volume, error) {
	p, err := d.pool()
	if err != nil {
		return nil, err
	}
	attached, err := d.attachments(ctx)
	if err != nil {
		return nil, err
	}
	var out []cluster.Volume
	for id, a := range attached {
		v, err := p.Volume(id)
		if err != nil {
			continue // it is being deleted
		}
		volume := cluster.Volume{Name: v.Name, Handle: id, Deaths: a.Deaths}
		if conditions := conditionsOf(p, id, a); len(conditions) > 0 {
			volume.Reason, volume.Message = conditions[0].GetReason(), conditions[0].GetMessage()
		}
		out = append(out, volume)
	}
	return out, nil
}

func condition(status csi.VolumeHealthErrorType, reason, message string) *csi.VolumeHealth_VolumeHealthEntry {
	return &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: inPlainWords(message)}
}

// NodeGetStorageHealth tells what is wrong with the node's pool, and with the engine that serves its volumes.
func (n *node) NodeGetStorageHealth(
	ctx context.Context, _ *csi.NodeGetStorageHealthRequest,
) (*csi.NodeGetStorageHealthResponse, error) {
	status, reason, message := n.storageHealth(ctx)
	resp := &csi.NodeGetStorageHealthResponse{}
	if reason != "" {
		resp.BackendHealth = []*csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			{Status: status, Reason: reason, Message: inPlainWords(message)},
		}
	}
	return resp, nil
}

// storageHealth returns the worst that is known; no reason: all is well.
func (d *Driver) storageHealth(ctx context.Context) (status csi.StorageHealthErrorType, reason, message string) {
	p, err := d.pool()
	if err != nil {
		return csi.StorageHealthErrorType_STORAGE_UNREACHABLE, "PoolNotReady", err.Error()
	}
	if _, err := d.engine.Probe(ctx); err != nil {
		return csi.StorageHealthErrorType_STORAGE_UNREACHABLE, "EngineUnavailable", err.Error()
	}
	space, err := p.Space(nil)
	if err != nil {
		return csi.StorageHealthErrorType_STORAGE_DEGRADED, "PoolUnreadable", err.Error()
	}
	if space.Free <= d.capacity.reserve {
		return csi.StorageHealthErrorType_STORAGE_DEGRADED, "PoolFull",
			"the pool's file system is nearly full: writes of pods may soon fail"
	}
	return 0, "", ""
}

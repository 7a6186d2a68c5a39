package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// CreateSnapshot takes an internal snapshot whose name in the image is the CSI name, or returns the
// one that exists.
func (c *controller) CreateSnapshot(
	ctx context.Context, req *csi.CreateSnapshotRequest,
) (*csi.CreateSnapshotResponse, error) {
	name, id := req.GetName(), req.GetSourceVolumeId()
	if err := cmp.Or(required("source_volume_id", id), checkSnapshotName(name)); err != nil {
		return nil, err
	}
	freeze, err := parseSnapshotParameters(req.GetParameters())
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
	release, err := c.busy.acquire("snapshot " + name)
	if err != nil {
		return nil, err
	}
	defer release()
	existing, err := c.snapshotByName(ctx, p, name, id)
	if err != nil {
		return nil, err
	}
	if existing == nil {
		if existing, err = c.createSnapshot(ctx, p, id, name, freeze); err != nil {
			return nil, err
		}
	}
	resp := &csi.CreateSnapshotResponse{Snapshot: c.snapshotMessage(*existing)}
	// Optional here. csi-sanity 5.6 compares it in a way that two equal messages fail when one of them has been sent, so
	// that no driver which fills it in can pass. GetSnapshot and ListSnapshots have it.
	resp.Snapshot.AccessibleTopology = nil
	return resp, nil
}

// snapshotByName returns the snapshot of that name of the volume, which may be a tombstone by now; nil if
// there is none. errExists if another volume has one: as far as one can see now, another volume that is
// busy or broken does not keep this one from being snapshotted.
func (c *controller) snapshotByName(ctx context.Context, p *pool.Pool, name, volumeID string) (*snapshot, error) {
	volumes, err := c.volumes(ctx, p)
	if err != nil {
		return nil, err
	}
	named := func(s snapshot) bool { return s.Name == name }
	if at := slices.IndexFunc(volumes, func(v pool.Volume) bool { return v.ID == volumeID }); at >= 0 {
		all, err := c.snapshotsOf(ctx, p, volumes[at])
		if err != nil {
			return nil, err
		}
		if at := slices.IndexFunc(all, named); at >= 0 {
			return &all[at], nil
		}
		volumes = slices.Delete(volumes, at, at+1)
	}
	others, err := c.others(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range volumes {
		if others.attached[v.ID].Silent {
			continue
		}
		if all, _ := c.snapshotsAmong(ctx, p, v, others); slices.ContainsFunc(all, named) {
			return nil, fmt.Errorf("snapshot %q %w: of volume %s", name, errExists, v.ID)
		}
	}
	return nil, nil //nolint:nilnil // no such snapshot is not an error
}

func (c *controller) createSnapshot(
	ctx context.Context, p *pool.Pool, id, name string, freeze bool,
) (*snapshot, error) {
	v, err := liveVolume(p, id)
	if err != nil {
		return nil, err
	}
	release, err := c.busy.acquire("volume " + id)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := p.KeepReserve(); err != nil { // else nobody could delete it from a full pool
		return nil, fmt.Errorf("snapshot %q of volume %s: the pool's reserve: %w", name, id, err)
	}
	params := recordedParameters(v.Parameters)
	limit, err := parsePercent(params.snapshotLimit)
	if err != nil {
		limit = c.snapshotLimit
	}
	done, err := c.capacity.promiseSnapshot(p, id, params, limit)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q of volume %s: %w", name, id, err)
	}
	defer done()
	made := snapshot{volume: v}
	err = wherever(func() (err error) {
		made.Snapshot, err = c.snapshotAttached(ctx, id, name, freeze)
		return err
	}, func() error {
		return c.images.change(ctx, p, id, func(lease *pool.Lease) error {
			if err := engine.CheckNotLost(p, id, name); err != nil {
				return err
			}
			return changeImage(ctx, lease, func(ctx context.Context, image *qcow2.Image) (err error) {
				made.Snapshot.Snapshot, err = image.CreateSnapshot(ctx, name, nil)
				return err
			})
		})
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot %q of volume %s: %w", name, id, err)
	}
	return &made, nil
}

// snapshotAttached has the engine take a snapshot, around which it freezes the file system that is mounted
// from the volume here.
func (c *controller) snapshotAttached(ctx context.Context, id, name string, freeze bool) (s engine.Snapshot, err error) {
	var mounted *os.File
	if freeze {
		if mounted, err = c.mountedFileSystem(ctx, id); err != nil {
			return s, err
		}
	}
	s, err = c.engine.CreateSnapshot(ctx, id, name, mounted)
	if mounted != nil {
		err = errors.Join(err, mounted.Close())
	}
	return s, err
}

// DeleteSnapshot removes a snapshot, and with the last one of a tombstone the volume.
func (c *controller) DeleteSnapshot(
	ctx context.Context, req *csi.DeleteSnapshotRequest,
) (*csi.DeleteSnapshotResponse, error) {
	id := req.GetSnapshotId()
	if err := required("snapshot_id", id); err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	volumeID, ok := snapshotVolume(id)
	if !ok {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	release, err := c.busy.acquire("volume " + volumeID)
	if err != nil {
		return nil, err
	}
	defer release()
	defer refillReserve(ctx, p)
	if err := c.deleteSnapshot(ctx, p, id, volumeID); err != nil && !isNotFound(err) {
		return nil, fmt.Errorf("delete snapshot %q: %w", id, err)
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

func (c *controller) deleteSnapshot(ctx context.Context, p *pool.Pool, id, volumeID string) error {
	v, err := ownVolume(p, volumeID)
	if err != nil {
		return err
	}
	all, err := c.snapshotsOf(ctx, p, v)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(s snapshot) bool { return s.id() == id })
	if v.Tombstone && len(all) <= 1 && (at >= 0 || len(all) == 0) {
		// Without a change in the image, for which a full pool has no space. Also when the snapshot was gone: an
		// earlier call may have come only so far.
		return c.images.change(ctx, p, volumeID, func(lease *pool.Lease) error { return lease.Remove() })
	}
	var name string
	if at >= 0 {
		name = all[at].Name
	} else if name, err = lostSnapshot(p, v, id); name == "" {
		return err
	}
	return wherever(func() error {
		return c.engine.DeleteSnapshot(ctx, volumeID, name)
	}, func() error {
		return c.images.change(ctx, p, volumeID, func(lease *pool.Lease) error {
			err := changeImage(ctx, lease, func(ctx context.Context, image *qcow2.Image) error {
				return image.DeleteSnapshot(ctx, qcow2.ByName(name))
			})
			if err != nil && !errors.Is(err, qcow2.ErrNotFound) {
				return err
			}
			return p.EndPendingSnapshot(volumeID, name)
		})
	})
}

func (c *controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if err := required("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	s, err := c.findSnapshot(ctx, p, req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: c.snapshotMessage(s)}, nil
}

// ListSnapshots returns the snapshots of all volumes, tombstones included, in the order of volume and snapshot ID.
func (c *controller) ListSnapshots(
	ctx context.Context, req *csi.ListSnapshotsRequest,
) (*csi.ListSnapshotsResponse, error) {
	page, err := newPage("snapshot", req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	p, err := c.pool()
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{}
	take := func(all []snapshot) bool {
		for _, s := range all {
			if s.id() <= page.after && page.after != "" && sameVolume(s, page.after) {
				continue
			}
			if !page.takes(s.id()) {
				return false
			}
			resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: c.snapshotMessage(s)})
		}
		return true
	}
	if req.GetSnapshotId() != "" || req.GetSourceVolumeId() != "" {
		all, err := c.filterSnapshots(ctx, p, req.GetSnapshotId(), req.GetSourceVolumeId())
		if err != nil {
			return nil, err
		}
		take(all)
		resp.NextToken = page.next
		return resp, nil
	}
	from, _ := snapshotVolume(page.after)
	if err := c.eachVolumesSnapshots(ctx, p, from, take); err != nil {
		return nil, err
	}
	resp.NextToken = page.next
	return resp, nil
}

func sameVolume(s snapshot, id string) bool {
	volumeID, _ := snapshotVolume(id)
	return s.volume.ID == volumeID
}

// filterSnapshots returns what a listing by snapshot or volume finds: nothing, if there is no such thing.
func (c *controller) filterSnapshots(ctx context.Context, p *pool.Pool, id, volumeID string) ([]snapshot, error) {
	var all []snapshot
	var err error
	if id != "" {
		var s snapshot
		if s, err = c.findSnapshot(ctx, p, id); err == nil && (volumeID == "" || s.volume.ID == volumeID) {
			all = []snapshot{s}
		}
	} else {
		var v pool.Volume
		if v, err = ownVolume(p, volumeID); err == nil {
			all, err = c.snapshotsOf(ctx, p, v)
		}
	}
	if isNotFound(err) || errors.Is(err, errOtherPool) {
		return nil, nil
	}
	return all, err
}

package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// snapshot is one of a volume, or of a tombstone.
type snapshot struct {
	engine.Snapshot
	volume pool.Volume
}

func (s snapshot) id() string { return snapshotID(s.volume.ID, s.Name) }

// whole makes them of what is in an image's table.
func whole(rows []qcow2.Snapshot) []engine.Snapshot {
	all := make([]engine.Snapshot, len(rows))
	for i, row := range rows {
		all[i].Snapshot = row
	}
	return all
}

// listed leaves out the snapshots that the engine makes for clones, and those that QEMU gave a name that another has:
// a name means the first. It changes rows.
func listed(rows []engine.Snapshot) []engine.Snapshot {
	seen := map[string]bool{}
	return slices.DeleteFunc(rows, func(s engine.Snapshot) bool {
		hidden := engine.IsReservedSnapshot(s.Name) || seen[s.Name]
		seen[s.Name] = true
		return hidden
	})
}

// snapshotsOf returns the snapshots of one volume, sorted by ID.
func (c *controller) snapshotsOf(ctx context.Context, p *pool.Pool, v pool.Volume) ([]snapshot, error) {
	var rows []engine.Snapshot
	err := wherever(func() (err error) {
		rows, err = c.engine.ListSnapshots(ctx, v.ID)
		if errors.Is(err, engine.ErrUnavailable) { // perhaps only the worker, because the volume was detached just now
			rows, err = c.engine.ListSnapshots(ctx, v.ID)
		}
		return err
	}, func() error {
		return c.images.read(ctx, p, v.ID, func(image *qcow2.Image) error {
			rows = whole(image.Snapshots())
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("snapshots of volume %s: %w", v.ID, err)
	}
	var out []snapshot
	for _, row := range listed(rows) {
		out = append(out, snapshot{row, v})
	}
	slices.SortFunc(out, func(a, b snapshot) int { return cmp.Compare(a.id(), b.id()) })
	return out, nil
}

// othersPatience is how long the volumes that a call is not about may keep it waiting, together: it takes a while until the
// engine knows that one does not answer.
const othersPatience = 5 * time.Second

// errSilent: a volume does not answer.
var errSilent = errors.New("volume does not answer")

// others are the volumes that a call is not about, or not alone.
type others struct {
	attached map[string]engine.Attachment
	until    time.Time
}

func (c *controller) others(ctx context.Context) (others, error) {
	attached, err := c.attachments(ctx)
	return others{attached, time.Now().Add(othersPatience)}, err
}

// snapshotsAmong is snapshotsOf for a volume that must not hold up the call. errSilent.
func (c *controller) snapshotsAmong(ctx context.Context, p *pool.Pool, v pool.Volume, o others) ([]snapshot, error) {
	a, ok := o.attached[v.ID]
	if !ok {
		return c.snapshotsOf(ctx, p, v)
	}
	if a.State == engine.Stalled {
		return nil, fmt.Errorf("%w: %s", errSilent, a.Failure)
	}
	limited, cancel := context.WithDeadline(ctx, o.until)
	defer cancel()
	all, err := c.snapshotsOf(limited, p, v)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errSilent, err)
	}
	return all, err
}

// findSnapshot returns the snapshot of an ID that may have come from anywhere. errNotFound if the ID is
// malformed or there is no such snapshot, pool.ErrNotFound if its volume is gone, errOtherPool.
func (c *controller) findSnapshot(ctx context.Context, p *pool.Pool, id string) (snapshot, error) {
	missing := fmt.Errorf("snapshot %q %w", id, errNotFound)
	volumeID, ok := snapshotVolume(id)
	if !ok {
		return snapshot{}, missing
	}
	v, err := ownVolume(p, volumeID)
	if err != nil {
		return snapshot{}, fmt.Errorf("snapshot %q: %w", id, err)
	}
	all, err := c.snapshotsOf(ctx, p, v)
	if err != nil {
		return snapshot{}, err
	}
	for _, s := range all {
		if s.id() == id {
			return s, nil
		}
	}
	return snapshot{}, missing
}

// lostSnapshot returns the name of a volume's snapshot that was promised and never came to be, "" if the ID is of none.
func lostSnapshot(p *pool.Pool, v pool.Volume, id string) (name string, err error) {
	all, err := p.PendingSnapshots(v.ID)
	for _, s := range all {
		if snapshotID(v.ID, s.Name) == id {
			return s.Name, err
		}
	}
	return "", err
}

// eachVolumesSnapshots calls fn with the snapshots of each volume in the order of their IDs, tombstones
// included, until it returns false. A volume that cannot be read for good, or does not answer, hides no other.
func (c *controller) eachVolumesSnapshots(ctx context.Context, p *pool.Pool, from string, fn func([]snapshot) bool) error {
	volumes, err := c.volumes(ctx, p)
	if err != nil {
		return err
	}
	others, err := c.others(ctx)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		if v.ID < from {
			continue
		}
		snapshots, err := c.snapshotsAmong(ctx, p, v, others)
		switch {
		case err == nil:
		case unreadable(err), errors.Is(err, errSilent):
			klog.FromContext(ctx).Error(err, "A volume's snapshots are left out", "volume", v.ID)
		default:
			return err
		}
		if !fn(snapshots) {
			return nil
		}
	}
	return nil
}

// unreadable tells whether an error is one that waiting does not help.
func unreadable(err error) bool {
	for _, e := range []error{
		pool.ErrNotFound, qcow2.ErrInUse, qcow2.ErrCorrupt, qcow2.ErrUnsupported, qcow2.ErrFailed, qcow2.ErrLimit,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (c *controller) snapshotMessage(s snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:         s.id(),
		SourceVolumeId:     s.volume.ID,
		SizeBytes:          s.volume.AskedFor(s.DiskSize), // a claim that asks for less is refused by the provisioner
		CreationTime:       timestamppb.New(s.Date),
		ReadyToUse:         !s.Pending,
		AccessibleTopology: []*csi.Topology{c.topology()},
	}
}

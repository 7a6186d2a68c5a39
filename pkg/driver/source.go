package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// sourceKind says what a volume's first content is.
type sourceKind string

const (
	noSource       sourceKind = ""
	snapshotSource sourceKind = "snapshot"
	volumeSource   sourceKind = "volume"
)

// contentSource is a CreateVolumeRequest's volume_content_source.
type contentSource struct {
	kind sourceKind
	id   string // of the snapshot or volume
}

func newContentSource(m *csi.VolumeContentSource) (contentSource, error) {
	switch {
	case m == nil:
		return contentSource{}, nil
	case m.GetSnapshot() != nil:
		id := m.GetSnapshot().GetSnapshotId()
		return contentSource{snapshotSource, id}, required("snapshot_id", id)
	case m.GetVolume() != nil:
		id := m.GetVolume().GetVolumeId()
		return contentSource{volumeSource, id}, required("volume_id", id)
	}
	return contentSource{}, invalid("volume_content_source is of an unknown kind")
}

// String is how pool.Volume.Source keeps it: "snapshot:<ID>", "volume:<ID>" or "".
func (s contentSource) String() string {
	if s.kind == noSource {
		return ""
	}
	return string(s.kind) + ":" + s.id
}

// contentSourceMessage is the reverse of contentSource.String.
func contentSourceMessage(source string) *csi.VolumeContentSource {
	kind, id, _ := strings.Cut(source, ":")
	switch sourceKind(kind) {
	case snapshotSource:
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
		}}
	case volumeSource:
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id},
		}}
	default:
		return nil
	}
}

// origin is what a new volume is a copy of: a state of an image. The zero value is none.
type origin struct {
	volume   pool.Volume
	snapshot string // name; "": the present content
	size     int64  // bytes
}

// resolve finds what a source names. On another node's pool it is errExhausted, which makes the
// provisioner ask for another node.
func (c *controller) resolve(ctx context.Context, p *pool.Pool, s contentSource) (o origin, err error) {
	switch s.kind {
	case noSource:
		return origin{}, nil
	case snapshotSource:
		var found snapshot
		if found, err = c.findSnapshot(ctx, p, s.id); err == nil && found.Pending {
			err = fmt.Errorf("%s is not ready to use: %w", s, errBusy)
		}
		if err == nil {
			return origin{found.volume, found.Name, found.DiskSize}, nil
		}
	case volumeSource:
		if o.volume, err = liveVolume(p, s.id); err == nil {
			if o.size, err = c.volumeSize(ctx, p, o.volume); err == nil {
				return o, nil
			}
		}
	}
	if errors.Is(err, errOtherPool) {
		err = refuse(errExhausted, "source %w", err)
	}
	return origin{}, err
}

// copyImage writes a copy of the origin at path: by the volume's worker, or here if it is not attached.
func (c *controller) copyImage(ctx context.Context, p *pool.Pool, o origin, path string, size int64) error {
	err := wherever(func() error {
		return c.engine.Clone(ctx, o.volume.ID, o.snapshot, path, size)
	}, func() error {
		return c.images.read(ctx, p, o.volume.ID, func(image *qcow2.Image) error {
			return copyState(ctx, image, o.snapshot, path, size)
		})
	})
	if errors.Is(err, qcow2.ErrOutOfRange) {
		return fmt.Errorf("%w: volume %s is expanded meanwhile: %w", errBusy, o.volume.ID, err)
	}
	return err
}

// copyState writes a copy of a snapshot, or of the present content if name is empty, at path, which must
// not exist.
func copyState(ctx context.Context, image *qcow2.Image, name, path string, size int64) error {
	view := image.Active()
	if name != "" {
		var err error
		if view, err = image.OpenSnapshot(qcow2.ByName(name)); err != nil {
			return err
		}
	}
	file, err := qcow2.CreateFile(path)
	if err != nil {
		return errors.Join(err, view.Close())
	}
	return errors.Join(qcow2.Clone(ctx, file, view, size, nil), file.Close(), view.Close())
}

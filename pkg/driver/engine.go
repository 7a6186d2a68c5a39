package driver

import (
	"context"
	"os"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// Engine is what the plugin uses of an engine.Client, and where each method is described.
type Engine interface {
	Probe(ctx context.Context) (version string, err error)
	Attach(ctx context.Context, volumeID string, avoid ...string) (engine.Device, error)
	Detach(ctx context.Context, volumeID string) error
	List(ctx context.Context) ([]engine.Attachment, error)
	Attachment(ctx context.Context, volumeID string) (engine.Attachment, error)
	Resize(ctx context.Context, volumeID string, size, asked int64) (int64, error)
	CreateSnapshot(ctx context.Context, volumeID, name string, freeze *os.File) (engine.Snapshot, error)
	DeleteSnapshot(ctx context.Context, volumeID, name string) error
	ListSnapshots(ctx context.Context, volumeID string) ([]engine.Snapshot, error)
	Clone(ctx context.Context, volumeID, snapshot, target string, size int64) error
	Blank(ctx context.Context, volumeID string) (bool, error)
}

var _ Engine = (*engine.Client)(nil)

// attachments returns the engine's attachments by volume ID, the failed ones included. Whoever needs to know of one volume
// asks for that alone, and waits for no other's worker.
func (d *Driver) attachments(ctx context.Context) (map[string]engine.Attachment, error) {
	list, err := d.engine.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]engine.Attachment, len(list))
	for _, a := range list {
		out[a.VolumeID] = a
	}
	return out, nil
}

// attachedSize returns the size of an attached volume in bytes. engine.ErrNotAttached.
func (d *Driver) attachedSize(ctx context.Context, id string) (int64, error) {
	a, err := d.engine.Attachment(ctx, id)
	if err != nil {
		return 0, err
	}
	return a.Size, a.Err()
}

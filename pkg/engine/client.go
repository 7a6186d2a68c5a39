package engine

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Client talks to an engine. Its errors match the sentinels of this package, of pkg/pool and of
// pkg/qcow2. It is safe for concurrent use.
type Client struct {
	api  api.EngineClient
	conn *grpc.ClientConn
	path string // of the engine's socket
}

// Device is an attached volume's.
type Device struct {
	Path string // /dev/loopN
	// FileDevice and FileInode are the identity of the file that it is bound to, by which LOOP_GET_STATUS64 tells it from
	// another's with the same number. 0: not known.
	FileDevice, FileInode uint64
}

// Attachment is a volume that the engine serves, or served until it failed.
type Attachment struct {
	VolumeID  string
	Device    string // /dev/loopN
	Size      int64  // virtual bytes
	WorkerPID int
	State     State
	Failure   string // why State is not Served
	Corrupt   bool   // the image is: it is read, and not written
	Deaths    int    // workers that died, and were replaced, since it was attached or the engine started
	// FileDevice and FileInode are those of Device.
	FileDevice, FileInode uint64
	Silent                bool // its worker has not answered yet: this is what it said before
}

// State is how an attached volume is served.
type State int

// States.
const (
	Served    State = iota // its users get what they ask for
	Failed                 // its users get errors
	Replacing              // its users wait for another worker
	Stalled                // its users wait, for a worker that does not answer or a disk that does not
)

// Err is nil if the volume is served, ErrNotAttached if it has failed, and else ErrUnavailable.
func (a Attachment) Err() error {
	switch a.State {
	case Served:
		return nil
	case Failed:
		return rpc.Refuse(ErrNotAttached, "volume %s has failed: %s", a.VolumeID, a.Failure)
	default:
		return rpc.Refuse(ErrUnavailable, "the users of volume %s wait: %s", a.VolumeID, a.Failure)
	}
}

// NewClient returns a client of the engine at endpoint, unix:///path. It connects when it is used, and
// again after the engine was restarted.
func NewClient(endpoint string) (*Client, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(rpc.DecodeErrors),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(rpc.MaxMessage)),
		// The default waits up to two minutes before it tries a restarted engine again. Without a time of its
		// own, an attempt to connect would have only that delay to succeed.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("client of %s: %w", endpoint, err)
	}
	return &Client{api: api.NewEngineClient(conn), conn: conn, path: path}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Probe returns the engine's version if it is up and its pool is usable.
func (c *Client) Probe(ctx context.Context) (version string, err error) {
	r, err := c.api.Probe(ctx, &api.ProbeRequest{})
	return r.GetVersion(), err
}

// Attach serves a volume as a block device and returns that; the same one if it is attached already. An attachment that
// failed is replaced.
func (c *Client) Attach(ctx context.Context, volumeID string, avoid ...string) (Device, error) {
	r, err := c.api.Attach(ctx, &api.AttachRequest{VolumeId: volumeID, Avoid: avoid})
	return Device{Path: r.GetDevice(), FileDevice: r.GetFileDevice(), FileInode: r.GetFileInode()}, err
}

// Detach ends a volume's device and closes its image; nil if it is not attached. ErrInUse while
// something has the device open.
func (c *Client) Detach(ctx context.Context, volumeID string) error {
	_, err := c.api.Detach(ctx, &api.DetachRequest{VolumeId: volumeID})
	return err
}

// List returns the attached volumes, the failed ones too, sorted by volume ID. It does not wait for a volume that does not
// answer: then it has what was known before.
func (c *Client) List(ctx context.Context) ([]Attachment, error) {
	return c.list(ctx, "")
}

// Attachment returns a volume's attachment. No other volume is asked. ErrNotAttached if it has none, not if it has failed.
func (c *Client) Attachment(ctx context.Context, volumeID string) (Attachment, error) {
	list, err := c.list(ctx, volumeID)
	if err != nil {
		return Attachment{}, err
	}
	at := slices.IndexFunc(list, func(a Attachment) bool { return a.VolumeID == volumeID }) // an older engine tells of all
	if at < 0 {
		return Attachment{}, fmt.Errorf("volume %s: %w", volumeID, ErrNotAttached)
	}
	return list[at], nil
}

func (c *Client) list(ctx context.Context, volumeID string) ([]Attachment, error) {
	r, err := c.api.List(ctx, &api.ListRequest{VolumeId: volumeID})
	if err != nil {
		return nil, err
	}
	out := make([]Attachment, 0, len(r.GetAttachments()))
	for _, a := range r.GetAttachments() {
		state := State(a.GetState())
		if state == Served && a.GetFailure() != "" { // an engine that knows no states
			state = Failed
		}
		out = append(out, Attachment{
			VolumeID: a.GetVolumeId(), Device: a.GetDevice(), Size: a.GetSize(), WorkerPID: int(a.GetWorkerPid()),
			State: state, Failure: a.GetFailure(), Corrupt: a.GetCorrupt(), Deaths: int(a.GetDeaths()),
			FileDevice: a.GetFileDevice(), FileInode: a.GetFileInode(), Silent: a.GetSilent(),
		})
	}
	return out, nil
}

// Resize makes an attached volume at least size virtual bytes long and returns what it has now. asked is what the caller was
// asked for, of which size is the next possible one.
// ErrNotAttached.
func (c *Client) Resize(ctx context.Context, volumeID string, size, asked int64) (int64, error) {
	r, err := c.api.Resize(ctx, &api.ResizeRequest{VolumeId: volumeID, Size: size, Asked: asked})
	return r.GetSize(), err
}

// Snapshot is a snapshot of an attached volume.
type Snapshot struct {
	qcow2.Snapshot
	Pending bool // its instant has passed, its metadata is still being written
}

// CreateSnapshot takes a snapshot of an attached volume; the one that exists if the name is taken.
// freeze, when not nil, is a directory on the file system that is mounted from the volume's device: it
// is frozen for the instant of the snapshot. The snapshot of a large volume may still be pending: a repeated call tells
// when it is whole. ErrNotAttached, ErrFreeze; ErrLost when a pending one never came to be.
func (c *Client) CreateSnapshot(ctx context.Context, volumeID, name string, freeze *os.File) (Snapshot, error) {
	req := &api.CreateSnapshotRequest{VolumeId: volumeID, Name: name}
	if freeze != nil {
		req.FreezeToken = rand.Text()
		if err := c.PassFD(ctx, req.GetFreezeToken(), freeze); err != nil {
			return Snapshot{}, err
		}
	}
	r, err := c.api.CreateSnapshot(ctx, req)
	if err != nil {
		return Snapshot{}, err
	}
	return snapshotFromAPI(r.GetSnapshot()), nil
}

// DeleteSnapshot removes a snapshot of an attached volume, or forgets a lost one; nil if there is none of that name.
// ErrNotAttached; qcow2.ErrInUse while it is cloned.
func (c *Client) DeleteSnapshot(ctx context.Context, volumeID, name string) error {
	_, err := c.api.DeleteSnapshot(ctx, &api.DeleteSnapshotRequest{VolumeId: volumeID, Name: name})
	return err
}

// ListSnapshots returns the snapshots of an attached volume in the order of its table, those that
// clones use left out, and a pending one. ErrNotAttached.
func (c *Client) ListSnapshots(ctx context.Context, volumeID string) ([]Snapshot, error) {
	r, err := c.api.ListSnapshots(ctx, &api.ListSnapshotsRequest{VolumeId: volumeID})
	if err != nil {
		return nil, err
	}
	var out []Snapshot
	for _, s := range r.GetSnapshots() {
		out = append(out, snapshotFromAPI(s))
	}
	return out, nil
}

// Clone writes a standalone image of size virtual bytes (0: the source's) at target, an absolute path
// inside the engine's pool, from a snapshot of an attached volume, or from its present content if
// snapshot is empty. target appears when it is whole. The clone goes on when ctx ends: a repeated call
// with the same target joins it. ErrNotAttached; qcow2.ErrExists if target exists.
func (c *Client) Clone(ctx context.Context, volumeID, snapshot, target string, size int64) error {
	_, err := c.api.Clone(ctx, &api.CloneRequest{VolumeId: volumeID, Snapshot: snapshot, Target: target, Size: size})
	return err
}

// Blank tells whether the image of an attached volume holds nothing: see qcow2.Image.Blank. ErrNotAttached.
func (c *Client) Blank(ctx context.Context, volumeID string) (bool, error) {
	r, err := c.api.Blank(ctx, &api.BlankRequest{VolumeId: volumeID})
	return r.GetBlank(), err
}

// socketPath returns the path of an endpoint unix:///path.
func socketPath(endpoint string) (string, error) {
	path, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("%w: endpoint %q is not unix:///path", ErrInvalid, endpoint)
	}
	return path, nil
}

func snapshotFromAPI(s *api.Snapshot) Snapshot {
	return Snapshot{
		Snapshot: qcow2.Snapshot{ID: s.GetId(), Name: s.GetName(), Date: s.GetCreationTime().AsTime(), DiskSize: s.GetDiskSize()},
		Pending:  s.GetPending(),
	}
}

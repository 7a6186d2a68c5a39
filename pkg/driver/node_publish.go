package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// NodePublishVolume binds a staged volume to a path of a pod: the mounted directory, or for a block volume
// the device's node.
func (n *node) NodePublishVolume(
	ctx context.Context, req *csi.NodePublishVolumeRequest,
) (*csi.NodePublishVolumeResponse, error) {
	id, capability := req.GetVolumeId(), req.GetVolumeCapability()
	err := cmp.Or(
		required("volume_id", id), checkPath("target_path", req.GetTargetPath()), checkCapability(capability))
	if err != nil {
		return nil, err
	}
	if req.GetStagingTargetPath() == "" {
		return nil, refuse(errPrecondition, "staging_target_path is missing")
	}
	if err := checkPath("staging_target_path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	_, release, err := n.hold(id)
	if err != nil {
		return nil, err
	}
	defer release()
	device, err := n.attachedDevice(ctx, id)
	if err != nil {
		return nil, err
	}
	defer device.close() // when it is bound
	target, err := followLink(req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	pub := publication{volume: id, device: device, target: target, readOnly: req.GetReadonly() || isReadOnly(capability)}
	if capability.GetBlock() != nil {
		err = n.publishBlock(ctx, pub, oneTarget(capability))
	} else {
		err = n.publishFileSystem(ctx, pub, req.GetStagingTargetPath(), oneTarget(capability))
	}
	if err != nil {
		return nil, fmt.Errorf("publish volume %s: %w", id, err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// attachedDevice opens the device of a volume that was staged, see openDevice. errPrecondition if it is not attached.
func (n *node) attachedDevice(ctx context.Context, id string) (blockDevice, error) {
	a, err := n.engine.Attachment(ctx, id)
	switch {
	case errors.Is(err, engine.ErrNotAttached):
		return blockDevice{}, refuse(errPrecondition, "it is not staged: %w", err)
	case err != nil:
		return blockDevice{}, err
	}
	return servedDevice(a)
}

// servedDevice opens the device of a volume that is well, see openDevice. That of a volume that has failed may be another's by
// now, and any other makes wait whoever opens it.
func servedDevice(a engine.Attachment) (blockDevice, error) {
	switch {
	case a.State == engine.Failed:
		return blockDevice{}, refuse(errPrecondition, "volume %s has failed, end the pods that use it, so that it is staged again: %s", a.VolumeID, a.Failure)
	case a.State != engine.Served:
		return blockDevice{}, a.Err()
	}
	return openDevice(engine.Device{Path: a.Device, FileDevice: a.FileDevice, FileInode: a.FileInode})
}

// publication is a volume at a pod's path.
type publication struct {
	volume   string // its ID
	device   blockDevice
	target   string
	readOnly bool
}

func (n *node) publishFileSystem(ctx context.Context, pub publication, staging string, alone bool) error {
	staged, err := mountAt(staging)
	if err != nil {
		return err
	}
	if staged == nil || staged.dev != pub.device.rdev {
		return refuse(errPrecondition, "the volume is not staged at %s", staging)
	}
	all, err := pub.device.fileSystemMounts()
	if err != nil {
		return err
	}
	extra, err := n.extraStagingPaths(pub.volume)
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(withoutPath(all, staged.path), func(m mountPoint) bool { return slices.Contains(extra, m.path) })
	done, err := n.published(ctx, pub, others, alone, func(m mountPoint) bool { return m.dev == pub.device.rdev })
	if err != nil || done {
		return err
	}
	if err := os.MkdirAll(pub.target, 0o750); err != nil {
		return err
	}
	return n.bind(staging, pub)
}

func (n *node) publishBlock(ctx context.Context, pub publication, alone bool) error {
	if err := refuseMounted(pub.device); err != nil {
		return err
	}
	all, err := pub.device.nodeMounts()
	if err != nil {
		return err
	}
	done, err := n.published(ctx, pub, all, alone, func(m mountPoint) bool { return m.isNodeOf(pub.device) })
	if err != nil {
		return err
	}
	if done {
		return protect(pub.device) // a call before may have come only as far as the bind
	}
	if err := n.bindNode(pub); err != nil {
		return err
	}
	if err := protect(pub.device); err != nil {
		return errors.Join(err, n.unmountAll(pub.target), os.Remove(pub.target))
	}
	return nil
}

// bindNode binds the device's node onto a file, which it makes.
func (n *node) bindNode(pub publication) error {
	if err := os.MkdirAll(filepath.Dir(pub.target), 0o750); err != nil {
		return err
	}
	file, err := os.OpenFile(pub.target, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return n.bind(pub.device.path, pub)
}

// published looks at what is published already: done if it is this. A mount at the target whose device died is
// removed. alone is for access modes that allow one target.
func (n *node) published(
	ctx context.Context, pub publication, mounts []mountPoint, alone bool, isOurs func(mountPoint) bool,
) (done bool, err error) {
	at, err := mountAt(pub.target)
	if err != nil {
		return false, err
	}
	switch {
	case at != nil && isOurs(*at) && at.readOnly == pub.readOnly:
		return true, nil
	case at != nil && isOurs(*at):
		return false, fmt.Errorf("a mount of the volume at %s %w: read-only is %v", pub.target, errExists, at.readOnly)
	case alone && len(mounts) > 0:
		return false, refuse(errPrecondition, "the volume is published at %s, and its access mode allows one target", mounts[0].path)
	case at != nil:
		return false, n.unmountStale(ctx, *at)
	}
	return false, nil
}

// bind mounts source at the target. What a failure leaves there is taken away.
func (n *node) bind(source string, pub publication) error {
	if err := bindMount(source, pub.target, pub.readOnly); err != nil {
		return errors.Join(err, os.Remove(pub.target))
	}
	return nil
}

// protect makes a device read-only when everybody has it read-only: a read-only mount of a device node does not
// keep anybody from writing to the device. Where one may write, the container's device rules keep
// the others from it.
func protect(device blockDevice) error {
	all, err := device.nodeMounts()
	if err != nil {
		return err
	}
	readOnly := len(all) > 0
	for _, m := range all {
		readOnly = readOnly && m.readOnly
	}
	flag := 0
	if readOnly {
		flag = 1
	}
	if err := unix.IoctlSetPointerInt(int(device.file.Fd()), unix.BLKROSET, flag); err != nil {
		return fmt.Errorf("make %s read-only %v: %w", device.path, readOnly, err)
	}
	return nil
}

// NodeUnpublishVolume takes a volume away from a pod's path, which it removes. The volume need not exist
// any more.
func (n *node) NodeUnpublishVolume(
	ctx context.Context, req *csi.NodeUnpublishVolumeRequest,
) (*csi.NodeUnpublishVolumeResponse, error) {
	id, target := req.GetVolumeId(), req.GetTargetPath()
	if err := cmp.Or(required("volume_id", id), checkPath("target_path", target)); err != nil {
		return nil, err
	}
	release, err := n.busy.acquire("node volume " + id)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := n.unpublish(ctx, id, target); err != nil {
		return nil, err
	}
	// Never what is in it: after the unmount that is not the volume's.
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if device, err := n.attachedDevice(ctx, id); err == nil {
		defer device.close()
		return &csi.NodeUnpublishVolumeResponse{}, protect(device)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// unpublish unmounts what is at a target. Where that is a symbolic link, the volume's mounts are behind it, and only those
// are unmounted there.
func (n *node) unpublish(ctx context.Context, id, target string) error {
	behind, err := followLink(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the link leads nowhere
	}
	if err != nil || behind == target {
		return cmp.Or(err, n.unmountAll(target))
	}
	for {
		m, err := mountAt(behind)
		if err != nil || m == nil {
			return err
		}
		device, err := n.attachedDevice(ctx, id)
		device.close()
		if err != nil || m.dev != device.rdev && !m.isNodeOf(device) {
			return n.unmountStale(ctx, *m)
		}
		if err := n.unmount(*m); err != nil {
			return err
		}
	}
}

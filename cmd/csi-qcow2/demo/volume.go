package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// volume is a CSI volume and where it is mounted.
type volume struct {
	world      *world
	name, id   string
	size       int64 // bytes
	capability *csi.VolumeCapability
	mounted    bool // staged or published, perhaps half
}

// newVolume returns a volume that is to be created.
func (w *world) newVolume(name string, size int64, c *csi.VolumeCapability) *volume {
	v := &volume{world: w, name: name, size: size, capability: c}
	w.volumes = append(w.volumes, v)
	return v
}

// fileSystem is a capability: a mounted file system of a type.
func fileSystem(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
	}
}

// rawBlock is a capability: a block device.
func rawBlock() *csi.VolumeCapability {
	c := fileSystem("")
	c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	return c
}

// create makes the volume: empty, or from the snapshot with that ID.
func (v *volume) create(ctx context.Context, snapshot string) error {
	request := &csi.CreateVolumeRequest{
		Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: v.size},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability},
	}
	if snapshot != "" {
		request.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot},
		}}
	}
	answer, err := v.world.controller.CreateVolume(ctx, request)
	v.id = answer.GetVolume().GetVolumeId()
	return err
}

// snapshot takes a snapshot of the volume and returns its ID.
func (v *volume) snapshot(ctx context.Context, name string) (string, error) {
	answer, err := v.world.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: name})
	if err != nil {
		return "", err
	}
	id := answer.GetSnapshot().GetSnapshotId()
	v.world.snapshots = append(v.world.snapshots, id)
	if !answer.GetSnapshot().GetReadyToUse() {
		return "", fmt.Errorf("snapshot %s is not ready to use", id)
	}
	return id, nil
}

func (v *volume) staging() string { return v.world.path(v.name, "staging") }

// path is where a pod would see the volume: a directory or a block device.
func (v *volume) path() string { return v.world.path(v.name, "volume") }

// image is the volume's file in the pool.
func (v *volume) image() string { return v.world.pool.ImagePath(v.id) }

// shortImage is image as seen from the pool's directory.
func (v *volume) shortImage() string { return "volumes/" + v.id + "/" + filepath.Base(v.image()) }

// mount stages and publishes the volume, as kubelet does when a pod starts.
func (v *volume) mount(ctx context.Context) error {
	if err := os.MkdirAll(v.staging(), 0o700); err != nil {
		return err
	}
	v.mounted = true
	_, err := v.world.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.capability,
	})
	if err != nil {
		return err
	}
	_, err = v.world.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), TargetPath: v.path(), VolumeCapability: v.capability,
	})
	return err
}

// unmount unpublishes and unstages the volume, as kubelet does when the pod has ended.
func (v *volume) unmount(ctx context.Context) error {
	if !v.mounted {
		return nil
	}
	_, err := v.world.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.path()})
	if err != nil {
		return err
	}
	_, err = v.world.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	v.mounted = err != nil
	return err
}

// grow makes the volume larger while it is in use.
func (v *volume) grow(ctx context.Context, size int64) error {
	_, err := v.world.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: v.path(), StagingTargetPath: v.staging(), VolumeCapability: v.capability,
		CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	v.size = size
	return err
}

// delete deletes the volume; one that is gone, or never was, is fine.
func (v *volume) delete(ctx context.Context) error {
	if v.id == "" {
		return nil
	}
	_, err := v.world.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

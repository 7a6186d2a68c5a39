package driver

import (
	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// attributeModeChange is the volume attribute of a PersistentVolume by which its author lets a volume that was made as a
// block device be mounted: the kernel will read, as a file system, what a tenant has written byte by byte.
const attributeModeChange = "allowVolumeModeChange"

// requestedMode is the mode of a volume that is to have these capabilities; "" if both.
func requestedMode(caps []*csi.VolumeCapability) string {
	block, mount := false, false
	for _, c := range caps {
		block = block || c.GetBlock() != nil
		mount = mount || c.GetMount() != nil
	}
	switch {
	case block && mount:
		return ""
	case block:
		return pool.ModeBlock
	}
	return pool.ModeFilesystem
}

// checkMode is errPrecondition if a volume is to be mounted that was made as a block device.
func checkMode(v pool.Volume, c *csi.VolumeCapability, attributes map[string]string) error {
	if v.Mode != pool.ModeBlock || c.GetMount() == nil || attributes[attributeModeChange] == "true" {
		return nil
	}
	return refuse(errPrecondition, "volume %s was made with volumeMode Block, it is not mounted as a file system; "+
		"a PersistentVolume with the volume attribute %s: \"true\" allows it", v.ID, attributeModeChange)
}

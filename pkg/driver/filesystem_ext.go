package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"
)

// The superblock of ext2, ext3 and ext4, byte offsets from its start at byte 1024 of the device.
const (
	extSuperblock    = 1024
	extBlocksLow     = 4
	extLogBlockSize  = 24 // of 1024 bytes
	extMagicAt       = 56
	extMagic         = 0xef53
	extIncompat      = 96
	extIncompat64Bit = 0x80
	extBlocksHigh    = 336
)

// fsckUncorrected is a bit of e2fsck's exit status.
const fsckUncorrected = 4

func isExt(fsType string) bool { return fsType == fsExt3 || fsType == fsExt4 }

// mayGrowMountedExt tells whether the kernel lets this process grow a mounted ext4. A privileged container may.
func mayGrowMountedExt() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0, nil
}

// extSize returns how many bytes of its device an ext file system uses.
func extSize(device string) (int64, error) {
	file, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	super := make([]byte, 1024)
	_, err = file.ReadAt(super, extSuperblock)
	if err := errors.Join(err, file.Close()); err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	logSize := le.Uint32(super[extLogBlockSize:])
	if le.Uint16(super[extMagicAt:]) != extMagic || logSize > 6 {
		return 0, fmt.Errorf("%w: no ext superblock on %s", errPrecondition, device)
	}
	blocks := uint64(le.Uint32(super[extBlocksLow:]))
	if le.Uint32(super[extIncompat:])&extIncompat64Bit != 0 {
		blocks |= uint64(le.Uint32(super[extBlocksHigh:])) << 32
	}
	return int64(blocks) << (10 + logSize), nil
}

// extMustGrowUnmounted tells whether an ext file system is smaller than its device and cannot be grown by
// this process while it is mounted.
func extMustGrowUnmounted(device blockDevice) (bool, error) {
	may, err := mayGrowMountedExt()
	if err != nil || may {
		return false, err
	}
	size, err := device.size()
	if err != nil {
		return false, err
	}
	used, err := extSize(device.path)
	return used < size, err
}

// growUnmountedExt grows an ext file system that is not mounted. resize2fs wants it checked.
func (n *node) growUnmountedExt(device blockDevice) error {
	out, err := n.mounter.Exec.Command("e2fsck", "-f", "-p", device.path).CombinedOutput()
	if exit := utilexec.ExitError(nil); errors.As(err, &exit) && exit.ExitStatus() == 1 {
		err = nil // errors were corrected
	}
	if err != nil {
		return fmt.Errorf("e2fsck -f -p %s: %w: %s", device.path, err, out)
	}
	if out, err := n.mounter.Exec.Command("resize2fs", device.path).CombinedOutput(); err != nil {
		return fmt.Errorf("resize2fs %s: %w: %s", device.path, err, out)
	}
	return nil
}

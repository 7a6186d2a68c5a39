package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// The superblock of ext2, ext3 and ext4, byte offsets from its start at byte 1024 of the device.
const (
	extSuperblock    = 1024
	extBlocksLow     = 4
	extLogBlockSize  = 24 // of 1024 bytes
	extMagicAt       = 56
	extMagic         = 0xef53
	extCompat        = 92
	extCompatJournal = 4
	extIncompat      = 96
	extIncompat64Bit = 0x80
	extJournalInode  = 224
	extBlocksHigh    = 336
	extMountOptions  = 512

	extMountOptionsBytes = 64
)

// Bits of e2fsck's exit status.
const (
	fsckUncorrected = 4
	fsckFailed      = 8 // to look: it does not know a feature, for example
)

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

// extSuper reads the superblock.
func extSuper(device string) ([]byte, error) {
	file, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	super := make([]byte, 1024)
	_, err = file.ReadAt(super, extSuperblock)
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint16(super[extMagicAt:]) != extMagic {
		return nil, refuse(errPrecondition, "no ext superblock on %s", device)
	}
	return super, nil
}

// extSize returns how many bytes of its device an ext file system uses.
func extSize(device string) (int64, error) {
	super, err := extSuper(device)
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	logSize := le.Uint32(super[extLogBlockSize:])
	if logSize > 6 {
		return 0, refuse(errPrecondition, "blocks of 2^%d KiB on %s", logSize, device)
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

// refuseForeignJournal is errPrecondition if an ext file system says that its journal is on another device: whoever wrote
// that may have meant that of somebody else. Mount options in the superblock can say so, too.
func refuseForeignJournal(device blockDevice) error {
	super, err := extSuper(device.path)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	own := strings.TrimRight(string(super[extMountOptions:extMountOptions+extMountOptionsBytes]), "\x00")
	switch {
	case le.Uint32(super[extCompat:])&extCompatJournal != 0 && le.Uint32(super[extJournalInode:]) == 0:
		return refuse(errPrecondition, "the file system has its journal on another device, or is to")
	case strings.Contains(own, "journal_"):
		return refuse(errPrecondition, "the file system's superblock has the mount options %q; `tune2fs -E mount_opts=` removes them", own)
	}
	return nil
}

// small tells whether a mounted ext file system is so much smaller than its device that it was not grown.
func small(device blockDevice, m mountPoint) bool {
	if !isExt(m.fsType) {
		return false
	}
	size, err := device.size()
	if err != nil {
		return false
	}
	used, err := extSize(device.path)
	return err == nil && used < size-size/16 // less is what no group of blocks fits in
}

package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	// maxIDLength is the CSI specification's general limit of a string, in bytes.
	maxIDLength = 128
	// maxNameLength is the longest snapshot name that QEMU's tools handle, in bytes.
	maxNameLength = 255

	snapshotSeparator = "@" // no volume ID contains it
	hashedName        = "~" // begins the second half of a snapshot ID that does not hold the name itself
)

// snapshotID returns the ID of a volume's snapshot: "<volume ID>@<name>", so that people can read it. A name
// that makes this longer than 128 bytes, is not text, or looks like the other form, is hashed: "<volume
// ID>@~<hash>". Whoever looks for an ID compares it with those of the volume's snapshots: it is never taken
// apart into a name.
func snapshotID(volumeID, name string) string {
	id := volumeID + snapshotSeparator + name
	if len(id) <= maxIDLength && utf8.ValidString(name) && !strings.HasPrefix(name, hashedName) {
		return id
	}
	sum := sha256.Sum256([]byte(name))
	return volumeID + snapshotSeparator + hashedName + hex.EncodeToString(sum[:16])
}

// snapshotVolume returns the volume that a snapshot ID names. False for an ID that this driver cannot
// have made.
func snapshotVolume(id string) (volumeID string, ok bool) {
	volumeID, _, ok = strings.Cut(id, snapshotSeparator)
	return volumeID, ok && pool.ValidID(volumeID)
}

// ownsHandle tells whether a volume ID or snapshot ID, which may come from anywhere, is of this node's pool.
func (d *Driver) ownsHandle(handle string) (bool, error) {
	p, err := d.pool()
	if err != nil {
		return false, err
	}
	volumeID, _, _ := strings.Cut(handle, snapshotSeparator)
	return p.Owns(volumeID), nil
}

// checkVolumeName and checkSnapshotName refuse what the CSI specification bans.
func checkVolumeName(name string) error {
	return checkName(name)
}

func checkSnapshotName(name string) error {
	if engine.IsReservedSnapshot(name) {
		return invalid("snapshot name %q is reserved", name)
	}
	return checkName(name)
}

func checkName(name string) error {
	if err := required("name", name); err != nil {
		return err
	}
	if len(name) > maxNameLength {
		return invalid("name of %d bytes; the limit is %d", len(name), maxNameLength)
	}
	for _, r := range name {
		control := r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f
		if control || r == utf8.RuneError {
			return invalid("name %q contains the character %U", name, r)
		}
	}
	return nil
}

// ownVolume returns the volume of an ID that may have come from anywhere: errNotFound if the ID is malformed,
// errOtherPool if the volume was made on another node, pool.ErrNotFound if it is gone. Tombstones are found.
func ownVolume(p *pool.Pool, id string) (pool.Volume, error) {
	if !pool.ValidID(id) {
		return pool.Volume{}, refuse(errNotFound, "volume %q is not one of this driver's", id)
	}
	if !p.Owns(id) {
		return pool.Volume{}, fmt.Errorf("volume %s %w", id, errOtherPool)
	}
	v, err := p.Volume(id)
	if err != nil {
		return pool.Volume{}, fmt.Errorf("volume %s: %w", id, err)
	}
	return v, nil
}

// liveVolume is ownVolume without tombstones.
func liveVolume(p *pool.Pool, id string) (pool.Volume, error) {
	v, err := ownVolume(p, id)
	if err == nil && v.Tombstone {
		return pool.Volume{}, refuse(errNotFound, "volume %s was deleted, only its snapshots remain", id)
	}
	return v, err
}

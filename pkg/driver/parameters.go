package driver

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Keys of a StorageClass's and a VolumeSnapshotClass's parameters, and of pool.Volume.Parameters.
const (
	paramClusterSize   = "clusterSize"
	paramPreallocation = "preallocation"
	paramFSType        = "fsType"
	paramSnapshotLimit = "snapshotLimit"
	paramFSFreeze      = "fsFreeze"
)

const (
	// minClusterSize is the largest block of direct I/O of today's disks: where it is that, the engine attaches nothing smaller.
	minClusterSize = 4 << 10
	maxClusterSize = 2 << 20
)

// volumeParameters are those of a StorageClass.
type volumeParameters struct {
	clusterSize int64 // bytes; 0: not given
	// preallocation of a new volume; a restored or cloned one is as thin as its origin.
	preallocation qcow2.Preallocation
	fsType        string // what a capability without a file system gets; "": not given
	snapshotLimit string // a number with a percent sign, of the volume's size; "": not given
}

// parseVolumeParameters refuses keys that it does not know. Those that the sidecars add are ignored.
func parseVolumeParameters(in map[string]string) (volumeParameters, error) {
	var out volumeParameters
	for _, key := range slices.Sorted(maps.Keys(in)) {
		value := in[key]
		var err error
		switch {
		case key == paramClusterSize:
			out.clusterSize, err = parseClusterSize(value)
		case key == paramPreallocation:
			if out.preallocation, err = qcow2.ParsePreallocation(value); err != nil {
				err = invalid("parameter %s is %q; it can be off, metadata, falloc or full", paramPreallocation, value)
			}
		case strings.EqualFold(key, paramFSType), key == "csi.storage.k8s.io/fstype":
			out.fsType, err = value, checkFSType(value)
		case key == paramSnapshotLimit:
			out.snapshotLimit = value
			_, err = parsePercent(value)
		case fromSidecar(key):
		default:
			err = invalid("unknown parameter %q", key)
		}
		if err != nil {
			return volumeParameters{}, err
		}
	}
	return out, nil
}

// claimOf returns what the provisioner says of the claim, with --extra-create-metadata.
func claimOf(in map[string]string) pool.Claim {
	return pool.Claim{
		Namespace:        in["csi.storage.k8s.io/pvc/namespace"],
		Name:             in["csi.storage.k8s.io/pvc/name"],
		PersistentVolume: in["csi.storage.k8s.io/pv/name"],
	}
}

func (p volumeParameters) clusterSizeOrDefault() int64 {
	if p.clusterSize == 0 {
		return qcow2.DefaultClusterSize
	}
	return p.clusterSize
}

// record is how the parameters are kept in volume.json.
func (p volumeParameters) record() map[string]string {
	out := map[string]string{paramClusterSize: strconv.FormatInt(p.clusterSize, 10)}
	if p.fsType != "" {
		out[paramFSType] = p.fsType
	}
	if p.snapshotLimit != "" {
		out[paramSnapshotLimit] = p.snapshotLimit
	}
	if p.preallocation != qcow2.PreallocationOff {
		out[paramPreallocation] = p.preallocation.String()
	}
	return out
}

// recordedParameters is the reverse of record.
func recordedParameters(in map[string]string) volumeParameters {
	size, err := strconv.ParseInt(in[paramClusterSize], 10, 64)
	if err != nil {
		size = qcow2.DefaultClusterSize
	}
	preallocation, err := qcow2.ParsePreallocation(in[paramPreallocation])
	if err != nil {
		preallocation = qcow2.PreallocationOff
	}
	return volumeParameters{clusterSize: size, preallocation: preallocation, fsType: in[paramFSType], snapshotLimit: in[paramSnapshotLimit]}
}

// parsePercent reads a snapshotLimit.
func parsePercent(s string) (int64, error) {
	digits, ok := strings.CutSuffix(s, "%")
	n, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || !ok {
		return 0, invalid("parameter %s is %q; it takes a percentage of the volume's size, as in 200%%", paramSnapshotLimit, s)
	}
	return int64(n), nil
}

// parseSnapshotParameters returns whether a mounted file system is to be frozen.
func parseSnapshotParameters(in map[string]string) (freeze bool, err error) {
	freeze = true
	for _, key := range slices.Sorted(maps.Keys(in)) {
		switch value := in[key]; {
		case key == paramFSFreeze && (value == "true" || value == "false"):
			freeze = value == "true"
		case key == paramFSFreeze:
			return false, invalid(`parameter %s is %q; it can be "true" or "false"`, paramFSFreeze, value)
		case fromSidecar(key):
		default:
			return false, invalid("unknown parameter %q", key)
		}
	}
	return freeze, nil
}

// fromSidecar tells whether a key is one that the sidecars use or add: names of the PVC, the PV, the
// snapshot, of secrets.
func fromSidecar(key string) bool { return strings.HasPrefix(key, "csi.storage.k8s.io/") }

// parseClusterSize reads bytes, or a number with a suffix: 64K, 64Ki and 64KiB are the same.
func parseClusterSize(s string) (int64, error) {
	number, unit := s, int64(1)
	upper := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "B"), "I")
	switch {
	case strings.HasSuffix(upper, "K"):
		number, unit = strings.TrimSuffix(upper, "K"), 1<<10
	case strings.HasSuffix(upper, "M"):
		number, unit = strings.TrimSuffix(upper, "M"), 1<<20
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil {
		return 0, invalid("parameter %s is %q; it takes bytes, or a number with K or M", paramClusterSize, s)
	}
	size := n * unit
	if size < minClusterSize || size > maxClusterSize || size&(size-1) != 0 {
		return 0, invalid("parameter %s is %q; it can be a power of two from 4K to 2M", paramClusterSize, s)
	}
	return size, nil
}

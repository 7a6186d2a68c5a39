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

// volumeParameters are those of a StorageClass. A new one is, in this file, a key, a field, a case of parseVolumeParameters, a line
// each of record, recordedParameters and match, and one of inherit if a copy keeps it unasked; a check of its value in
// parameter_values.go; rows in TestVolumeParameters, TestEachParameter and TestMessagesOfRequests; a row in docs/use.md, and what it refuses in
// docs/troubleshooting.md. What one does to a mount belongs in mountOptions.
type volumeParameters struct {
	clusterSize   int64 // bytes; 0: not given
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

// match tells whether a volume has these parameters. What is not given matches anything.
func (p volumeParameters) match(v pool.Volume) bool {
	has := recordedParameters(v.Parameters)
	return (p.clusterSize == 0 || p.clusterSize == has.clusterSize) && (p.fsType == "" || p.fsType == has.fsType) &&
		(p.snapshotLimit == "" || p.snapshotLimit == has.snapshotLimit) && p.preallocation == has.preallocation
}

// inherit completes the parameters of a new volume. A copy has its origin's cluster size, because clusters are shared with the
// origin's file, and its file system. It is as thin as its origin, and limited in its snapshots as its own class says.
func (p volumeParameters) inherit(from pool.Volume) (volumeParameters, error) {
	if from.ID == "" {
		p.clusterSize = p.clusterSizeOrDefault()
		return p, nil
	}
	has := recordedParameters(from.Parameters)
	if p.clusterSize != 0 && p.clusterSize != has.clusterSize {
		return p, invalid("parameter %s is %d, the source has %d; a copy keeps it", paramClusterSize, p.clusterSize, has.clusterSize)
	}
	p.clusterSize = has.clusterSize
	if p.fsType == "" {
		p.fsType = has.fsType
	}
	return p, nil
}

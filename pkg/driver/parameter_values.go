package driver

import (
	"strconv"
	"strings"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	// minClusterSize is the largest block of direct I/O of today's disks: where it is that, the engine attaches nothing smaller.
	minClusterSize = 4 << 10
	maxClusterSize = 2 << 20
)

// fromSidecar tells whether a key is one that the sidecars use or add: names of the PVC, the PV, the
// snapshot, of secrets.
func fromSidecar(key string) bool { return strings.HasPrefix(key, "csi.storage.k8s.io/") }

// claimOf returns what the provisioner says of the claim, with --extra-create-metadata.
func claimOf(in map[string]string) pool.Claim {
	return pool.Claim{
		Namespace:        in["csi.storage.k8s.io/pvc/namespace"],
		Name:             in["csi.storage.k8s.io/pvc/name"],
		PersistentVolume: in["csi.storage.k8s.io/pv/name"],
	}
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

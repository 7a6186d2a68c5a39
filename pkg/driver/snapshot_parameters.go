package driver

import (
	"maps"
	"slices"
)

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

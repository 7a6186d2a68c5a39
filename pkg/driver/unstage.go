package driver

import (
	"encoding/json"
	"errors"
	"io/fs"
	"slices"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// extraStaging lists, in its note, paths at which a volume was staged while it was mounted elsewhere. Only those are noted: at
// any other one, what else is mounted of the volume is published.
const extraStaging pool.Marker = "staged-again"

// checkUnpublished is errPrecondition while the file system on a device that is to be unmounted from its staging path is
// published.
func (n *node) checkUnpublished(device blockDevice, staging, id string) error {
	extra, err := n.extraStagingPaths(id)
	if err != nil {
		return err
	}
	others, err := otherMounts(device, staging)
	if err != nil {
		return err
	}
	published := slices.DeleteFunc(slices.Clone(others), func(m mountPoint) bool { return slices.Contains(extra, m.path) })
	if at, err := resolve(staging); len(published) > 0 && (err != nil || !slices.Contains(extra, at)) {
		return refuse(errPrecondition, "the volume is published at %s", published[0].path)
	}
	return nil
}

// stagedElsewhere tells, of a volume that was unmounted from a staging path, whether it is still mounted, at another one.
func (n *node) stagedElsewhere(device blockDevice, staging, id string) (bool, error) {
	others, err := otherMounts(device, staging)
	if err != nil {
		return false, err
	}
	at, err := resolve(staging)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return len(others) > 0, n.changeExtraStaging(id, func(paths []string) []string {
		return slices.DeleteFunc(paths, func(path string) bool { return path == at || len(others) == 0 })
	})
}

// otherMounts returns where a device, or its node, is mounted but at its staging path.
func otherMounts(device blockDevice, staging string) ([]mountPoint, error) {
	fileSystem, err := device.fileSystemMounts()
	if err != nil {
		return nil, err
	}
	nodes, err := device.nodeMounts()
	if err != nil {
		return nil, err
	}
	at, err := resolve(staging)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return withoutPath(append(fileSystem, nodes...), at), nil
}

// extraStagingPaths returns what extraStaging lists, none for a volume that is gone.
func (n *node) extraStagingPaths(id string) (paths []string, err error) {
	p, err := n.pool()
	if err != nil {
		return nil, err
	}
	note, set, err := p.Marked(id, extraStaging)
	if errors.Is(err, pool.ErrNotFound) || errors.Is(err, pool.ErrBadID) {
		return nil, nil
	}
	if set && err == nil {
		err = json.Unmarshal(note, &paths)
	}
	return paths, err
}

// changeExtraStaging records what change makes of the paths.
func (n *node) changeExtraStaging(id string, change func([]string) []string) error {
	before, err := n.extraStagingPaths(id)
	if err != nil {
		return err
	}
	after := change(slices.Clone(before))
	if slices.Equal(before, after) {
		return nil
	}
	p, err := n.pool()
	if err != nil {
		return err
	}
	if len(after) == 0 {
		return p.Unmark(id, extraStaging)
	}
	note, err := json.Marshal(after)
	if err != nil {
		return err
	}
	return p.Mark(id, extraStaging, note)
}

package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const fiThaw = 0xC0045878 // FITHAW of linux/fs.h

// extraStaging lists, in its note, paths at which a volume was staged while it was mounted elsewhere. Only those are noted: at
// any other one, what else is mounted of the volume is published.
const extraStaging pool.Marker = "staged-again"

// prepareUnmount makes the file system on a device ready to be unmounted from its staging path. errPrecondition while it is
// published. errBusy while it is frozen for a snapshot.
func (n *node) prepareUnmount(device blockDevice, staging, id string) error {
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
		return fmt.Errorf("%w: the volume is published at %s", errPrecondition, published[0].path)
	}
	if len(others) > 0 {
		return nil
	}
	return n.thaw(device, id)
}

// thaw lets a file system go on that a pod has frozen and left so: it would keep its device when it is unmounted.
func (n *node) thaw(device blockDevice, id string) error {
	at, err := device.fileSystemMounts()
	if err != nil || len(at) == 0 {
		return err
	}
	p, err := n.pool()
	if err != nil {
		return err
	}
	if _, frozen, err := p.Marked(id, pool.Frozen); err == nil && frozen {
		return fmt.Errorf("%w: the file system is frozen for a snapshot", errBusy)
	}
	dir, err := openMount(at[0])
	if err != nil || dir == nil {
		return err
	}
	defer dir.Close()
	root, err := unix.Openat(int(dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // a path takes no ioctl
	if err != nil {
		return fmt.Errorf("open the file system at %s: %w", at[0].path, err)
	}
	defer unix.Close(root)
	for err == nil { // as often as it was frozen
		err = unix.IoctlSetInt(root, fiThaw, 0)
	}
	if errors.Is(err, unix.EINVAL) { // it is not, any more
		return nil
	}
	return fmt.Errorf("thaw the file system at %s: %w", at[0].path, err)
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

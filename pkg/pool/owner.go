package pool

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// A pool must be served by one node only: two that have the same one, because a machine or a directory was copied, would
// both answer for its volumes. So pool.json says whose it is. The node's name is what a cluster tells nodes apart by: it
// stays when a machine is replaced, and a cloned machine must have another one. Within a node, a copied directory is told
// by the time at which the directory of the volumes was made, which a file system keeps and no copy can have.

// ErrForeign is an ErrNotReady: the pool belongs to another node, or is a copy of a pool.
var ErrForeign = fmt.Errorf("%w: it belongs elsewhere", ErrNotReady)

// OpenOn opens a pool in order to serve it on a node. The first who does so makes it that node's; an empty name leaves
// this to another. ErrForeign if it is another's already, from here and from each operation later.
func OpenOn(path, node string) (*Pool, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	root, id, err := enter(path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := id.checkOwner(root, node); err != nil {
		return nil, err
	}
	if id != id.ownedBy(node, root.birth()) {
		if err := bind(root, node); err != nil {
			return nil, err
		}
	}
	return &Pool{path: path, uuid: id.UUID, served: true, node: node}, nil
}

// Adopt makes a pool the one of a node, whosever it was: after its disk has moved for good, or its node has another name
// now. With an empty name it belongs to whoever serves it next.
func Adopt(path, node string) error {
	root, _, err := enter(path)
	if err != nil {
		return err
	}
	defer root.Close()
	return changeIdentity(root, func(id identity) (identity, error) {
		id.Node, id.Birth = node, root.birth()
		return id, nil
	})
}

// bind completes what pool.json says of the owner. On a full file system it is left to the next time.
func bind(root dir, node string) error {
	err := changeIdentity(root, func(id identity) (identity, error) {
		return id.ownedBy(node, root.birth()), id.checkOwner(root, node) // somebody else may have been first
	})
	if errors.Is(err, qcow2.ErrNoSpace) {
		return nil
	}
	return err
}

func changeIdentity(root dir, change func(identity) (identity, error)) error {
	lock, err := lockDir(root, exclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	id, err := readIdentity(root)
	if err != nil {
		return err
	}
	if id, err = change(id); err != nil {
		return err
	}
	return writeIdentity(root, id)
}

func (id identity) ownedBy(node, birth string) identity {
	id.Node, id.Birth = cmp.Or(id.Node, node), cmp.Or(id.Birth, birth)
	return id
}

// checkOwner is ErrForeign if root is not the directory that id was written for, or another node's.
func (id identity) checkOwner(root dir, node string) error {
	switch birth := root.birth(); {
	case id.Node != "" && node != "" && id.Node != node:
		return fmt.Errorf("%w: %s is pool %s of node %q, and this is node %q: %s",
			ErrForeign, root.Name(), id.UUID, id.Node, node, howToSettle(root))
	case id.Birth != "" && birth != "" && id.Birth != birth:
		return fmt.Errorf("%w: %s is a copy of pool %s (of node %q): %s", ErrForeign, root.Name(), id.UUID, id.Node, howToSettle(root))
	}
	return nil
}

func howToSettle(root dir) string {
	return fmt.Sprintf(`if it has come here for good, run "csi-qcow2 pool adopt %[1]s"; `+
		`if the other is still in use, "csi-qcow2 pool init --new-uuid %[1]s" makes this one a pool of its own`, root.Name())
}

func writeIdentity(root dir, id identity) error {
	data, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return noSpace(root.replaceFile(identityFile, append(data, '\n')))
}

// birth says when the pool's directory of volumes was made; "" where the file system does not know.
func (d dir) birth() string {
	var st unix.Statx_t
	err := d.control(func(fd int) error {
		return unix.Statx(fd, volumesDir, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &st)
	})
	if err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return ""
	}
	return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).UTC().Format(time.RFC3339Nano)
}

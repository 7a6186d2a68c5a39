package driver

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/thread"
)

// namespace is a mount namespace that shows programs what they need and nothing else: mkfs.xfs and resize2fs, for example,
// look at whatever is mounted, and would wait for the server of a pod's file system that never answers.
type namespace struct{ file *os.File }

// scratch is an empty file system in a namespace, and the place of the one mount that a program may be shown.
const scratch = "/tmp"

// newNamespace makes one of the root file system and /usr, /dev, /proc and /sys, where those are mounts, each without
// what is mounted below it.
func newNamespace() (*namespace, error) {
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	ns := &namespace{}
	err = thread.Run(func() error {
		// From here on this thread's mounts are its own. The copies of all others go at once: they keep devices busy.
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		switch err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); {
		case errors.Is(err, unix.EINVAL):
			return errors.New("the root directory is no mount point, as in a chroot: bind-mount it on itself first")
		case err != nil:
			return os.NewSyscallError("mount", err)
		}
		shown := []string{"/"}
		for _, path := range []string{"/usr", "/dev", "/proc", "/sys"} {
			if slices.ContainsFunc(all, func(m mountPoint) bool { return m.path == path }) {
				shown = append(shown, path)
			}
		}
		if err := rebuildRoot(shown); err != nil {
			return err
		}
		ns.file, err = os.Open("/proc/thread-self/ns/mnt")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a mount namespace for mkfs and its like: %w", err)
	}
	return ns, nil
}

// rebuildRoot replaces all mounts of this thread's namespace by copies of some, the first of which is that of the root.
func rebuildRoot(shown []string) error {
	var trees []int
	defer func() {
		for _, tree := range trees {
			_ = unix.Close(tree)
		}
	}()
	for _, path := range shown {
		tree, err := copyMount(path)
		if err != nil {
			return err
		}
		trees = append(trees, tree)
	}
	// The new root needs a place, and /dev is on every system.
	if err := attachMount(trees[0], "/dev"); err != nil {
		return err
	}
	if err := unix.Fchdir(trees[0]); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	for i, path := range shown[1:] {
		if err := attachMount(trees[i+1], strings.TrimPrefix(path, "/")); err != nil {
			return err
		}
	}
	if err := unix.Mount("tmpfs", strings.TrimPrefix(scratch, "/"), "tmpfs", 0, "size=1m"); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	return os.NewSyscallError("chdir", unix.Chdir("/"))
}

// start calls fn, which starts a process, in the namespace. mounted, unless empty, is shown at scratch to that process
// alone.
func (ns *namespace) start(mounted string, fn func() error) error {
	return thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		tree := -1
		if mounted != "" {
			var err error
			if tree, err = copyMount(mounted); err != nil {
				return err
			}
			defer unix.Close(tree)
		}
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("setns", err)
		}
		if tree >= 0 {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if err := attachMount(tree, scratch); err != nil {
				return err
			}
		}
		return fn()
	})
}

func (ns *namespace) Close() error { return ns.file.Close() }

// copyMount returns a mount that is attached nowhere, of what is mounted at path, and of nothing below it.
func copyMount(path string) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return tree, nil
}

func attachMount(tree int, path string) error {
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

// bindMount mounts what is at source at target, too. A failure leaves nothing.
func bindMount(source, target string, readOnly bool) (err error) {
	tree, err := copyMount(source)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(tree)) }()
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return &os.PathError{Op: "mount_setattr", Path: source, Err: err}
		}
	}
	return attachMount(tree, target)
}

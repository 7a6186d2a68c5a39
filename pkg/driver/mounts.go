package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// blockDevice is an attached volume's device.
type blockDevice struct {
	path string // /dev/loopN
	rdev uint64
	on   uint64   // the device of the file system that its node is on
	file *os.File // nil unless it was opened
}

func newBlockDevice(path string) (blockDevice, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return blockDevice{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return blockDevice{}, refuse(errPrecondition, "%s is no block device", path)
	}
	return blockDevice{path: path, rdev: st.Rdev, on: st.Dev}, nil
}

// openDevice opens the device of an attached volume, and makes sure that it is this volume's. A number that is free goes to
// whoever wants one, but as long as the device is open it stays what it is. The caller closes it.
func openDevice(d engine.Device) (blockDevice, error) {
	b, err := newBlockDevice(d.Path)
	if err != nil {
		return b, err
	}
	if b.file, err = os.Open(d.Path); err != nil {
		return b, err
	}
	if d.FileInode == 0 {
		return b, nil // an engine that does not tell
	}
	info, err := unix.IoctlLoopGetStatus64(int(b.file.Fd()))
	if err == nil && (info.Device != d.FileDevice || info.Inode != d.FileInode) {
		err = errors.New("it is bound to another file")
	}
	if err != nil {
		b.close()
		return b, refuse(errPrecondition, "%s is no longer the volume's, end the pods that use it, so that it is staged again: %w", d.Path, err)
	}
	return b, nil
}

func (b blockDevice) close() {
	if b.file != nil {
		_ = b.file.Close()
	}
}

// size returns the length in bytes of a device that was opened.
func (b blockDevice) size() (int64, error) { return b.file.Seek(0, io.SeekEnd) }

// mountPoint is a line of mountinfo.
type mountPoint struct {
	path     string
	fsType   string
	dev      uint64 // of the file system
	root     string // of the mount inside its file system
	readOnly bool   // this mount
	superRO  bool   // the whole file system
}

// mounts returns what is mounted, in mount order: of several at one path the last is seen.
func mounts() ([]mountPoint, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	out := make([]mountPoint, 0, len(infos))
	for _, m := range infos {
		out = append(out, mountPoint{
			path: m.Mountpoint, fsType: m.FSType, root: m.Root,
			dev:      unix.Mkdev(uint32(m.Major), uint32(m.Minor)),
			readOnly: hasOption(m.Options, "ro"),
			superRO:  hasOption(m.VFSOptions, "ro"),
		})
	}
	return out, nil
}

func hasOption(options, option string) bool {
	return slices.Contains(strings.Split(options, ","), option)
}

// fileSystemMounts returns where the file system on a device is mounted.
func (b blockDevice) fileSystemMounts() ([]mountPoint, error) {
	all, err := mounts()
	return slices.DeleteFunc(all, func(m mountPoint) bool { return m.dev != b.rdev }), err
}

// nodeMounts returns where the device's own node is bound.
func (b blockDevice) nodeMounts() ([]mountPoint, error) {
	all, err := mounts()
	return slices.DeleteFunc(all, func(m mountPoint) bool { return !m.isNodeOf(b) }), err
}

// boundLoops returns the loop devices whose nodes are bound anywhere. One that is free now would become the device of whoever has
// that mount, too.
func boundLoops() (paths []string, err error) {
	var dev unix.Stat_t
	if err := unix.Stat("/dev", &dev); err != nil {
		return nil, &os.PathError{Op: "stat", Path: "/dev", Err: err}
	}
	all, err := mounts()
	for _, m := range all {
		b := blockDevice{path: "/dev/" + filepath.Base(m.root), on: dev.Dev}
		if strings.HasPrefix(b.path, "/dev/loop") && m.isNodeOf(b) {
			paths = append(paths, b.path)
		}
	}
	return paths, err
}

// isNodeOf tells whether a mount is a bind of a device's node: of the same file in the same file system. The mount itself is
// not touched. Whose it is, is not known, and it may be one that never answers.
func (m mountPoint) isNodeOf(b blockDevice) bool {
	return m.dev == b.on && (strings.HasSuffix(b.path, m.root) || strings.HasSuffix(m.root, b.path)) &&
		filepath.Base(m.root) == filepath.Base(b.path)
}

// mountAt returns the mount that is seen at a path, or nil.
func mountAt(path string) (*mountPoint, error) {
	path, err := resolve(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // nothing is mounted at a path that does not exist
	} else if err != nil {
		return nil, err
	}
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range slices.Backward(all) {
		if m.path == path {
			return &m, nil
		}
	}
	return nil, nil //nolint:nilnil // nothing is mounted there
}

// resolve returns a path as mountinfo has it. What is mounted at the path itself may be dead: it is not touched.
func resolve(path string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	return filepath.Join(dir, filepath.Base(path)), err
}

// followLink returns where a symbolic link leads, or path if it is none. What is mounted there is not touched.
func followLink(path string) (string, error) {
	if _, err := os.Readlink(path); err != nil {
		return path, nil //nolint:nilerr // it is no link
	}
	return filepath.EvalSymlinks(path)
}

// checkPath refuses a path that is not absolute and clean.
func checkPath(name, path string) error {
	if err := required(name, path); err != nil {
		return err
	}
	if !filepath.IsAbs(path) || path == "/" || slices.Contains(strings.Split(path, "/"), "..") {
		return invalid("%s %q is not an absolute path without ..", name, path)
	}
	return nil
}

// unmountAll unmounts whatever is mounted at path.
func (n *node) unmountAll(path string) error {
	for {
		m, err := mountAt(path)
		if err != nil || m == nil {
			return err
		}
		if err := n.unmount(*m); err != nil {
			return err
		}
	}
}

// unmount unmounts what is seen at a path. What is not ours only goes out of sight: its server may never answer.
func (n *node) unmount(m mountPoint) error {
	if !m.isLoop() {
		return os.NewSyscallError("umount2", unix.Unmount(m.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	return n.programs.mustRun(program{device: m.path, limit: quick, visible: true, command: []string{"umount", m.path}})
}

// unmountStale takes away what an earlier device of a volume left at a path when it died with the engine. There is
// nothing left to write to it, and processes that still use it do not keep it in the way. errPrecondition
// if the mount is anything else.
func (n *node) unmountStale(ctx context.Context, m mountPoint) error {
	attached, err := n.attachments(ctx)
	if err != nil {
		return err
	}
	stale := m.isLoop()
	for _, a := range attached {
		device, err := newBlockDevice(a.Device)
		inUse := err == nil && a.State != engine.Failed && (m.dev == device.rdev || m.isNodeOf(device))
		stale = stale && !inUse
	}
	if !stale {
		return refuse(errPrecondition, "something else is mounted at %s (%s)", m.path, m.fsType)
	}
	if err := unix.Unmount(m.path, unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "unmount", Path: m.path, Err: err}
	}
	return nil
}

// isLoop tells whether a mount is of a file system on a loop device, or of such a device's node, as every one of
// ours is.
func (m mountPoint) isLoop() bool {
	const loopMajor = 7
	node := strings.HasPrefix(filepath.Base(m.root), "loop") && (m.fsType == "devtmpfs" || m.fsType == "tmpfs")
	return node || unix.Major(m.dev) == loopMajor
}

func withoutPath(in []mountPoint, path string) []mountPoint {
	return slices.DeleteFunc(in, func(m mountPoint) bool { return m.path == path })
}

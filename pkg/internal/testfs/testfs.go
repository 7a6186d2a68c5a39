// Package testfs mounts file systems for the duration of a test, and fills them.
package testfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/detached"
)

// Tmpfs mounts an empty tmpfs of a size, as mount(8) has it, and returns its path. See detached.
func Tmpfs(t *testing.T, size string) string {
	t.Helper()
	return mount(t, "tmpfs", "size", size)
}

// Image mounts a new file system of a size in bytes, on a loop device that goes with the mount, and returns its path. mkfs
// is the command that makes it; the path of the file to make it in is appended. See detached.
func Image(t *testing.T, fsType string, size int64, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "fs")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), mkfs[0], append(mkfs[1:], image)...) //nolint:gosec // the tests' own
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(mkfs, " "), err, out)
	}
	loop, err := loopDevice(image)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	return mount(t, fsType, "source", loop.Name())
}

// FillUp makes a file that takes all there is of its file system, to the last block.
func FillUp(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := int64(0)
	for size := int64(64 << 20); size >= 512; size /= 2 {
		for unix.Fallocate(int(f.Fd()), 0, end, size) == nil {
			end += size
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// loopDevice makes a loop device that is gone when nothing has it open.
func loopDevice(image string) (*os.File, error) {
	backing, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			return loop, nil
		}
		_ = loop.Close()
		if !errors.Is(err, unix.EBUSY) { // somebody else has it
			return nil, err
		}
	}
}

// mount mounts a file system nowhere: it goes with its descriptor, however the test ends. The path that it returns
// is good for other processes too.
func mount(t *testing.T, fsType, option, value string) string {
	t.Helper()
	mount, err := detached.Mount(fsType, map[string]string{option: value})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(mount) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), mount)
}

package qcow2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts an empty tmpfs of a size for the duration of a test.
func mountTmpfs(t *testing.T, size string) string {
	t.Helper()
	return mountDetached(t, "tmpfs", "size", size)
}

// mountImage mounts a new file system, on a loop device that goes with the mount.
func mountImage(t *testing.T, fsType string, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 320<<20); err != nil { // XFS wants 300 MiB
		t.Fatal(err)
	}
	runTool(t, append(mkfs, image)...)
	loop, err := loopDevice(image)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	return mountDetached(t, fsType, "source", loop.Name())
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

// mountDetached mounts a file system nowhere: it goes with its descriptor, however the test ends. The path
// that it returns is good for other processes too.
func mountDetached(t *testing.T, fsType, option, value string) string {
	t.Helper()
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	if err := errors.Join(unix.FsconfigSetString(fs, option, value), unix.FsconfigCreate(fs)); err != nil {
		t.Fatalf("mount %s: %v", fsType, err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("mount %s: %v", fsType, err)
	}
	t.Cleanup(func() { _ = unix.Close(mount) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), mount)
}

func runTool(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
}

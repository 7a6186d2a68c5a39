package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// mountImage mounts a new file system of a size, on a loop device that goes with the mount.
func mountImage(t *testing.T, fsType string, size int64, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "fs")
	must(t, os.WriteFile(image, nil, 0o600), os.Truncate(image, size))
	runTool(t, append(mkfs, image)...)
	loop, err := loopDevice(image)
	must(t, err)
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

// staleSource is the source of mounts of these tests; a process ID follows.
const staleSource = "pool-test-"

// mountOver mounts an empty tmpfs over a directory; unmount takes it away before the test ends.
func mountOver(t *testing.T, dir string) (unmount func()) {
	t.Helper()
	unmountStale(t)
	must(t, unix.Mount(staleSource+strconv.Itoa(os.Getpid()), dir, "tmpfs", 0, ""))
	unmount = sync.OnceFunc(func() { must(t, unix.Unmount(dir, 0)) })
	t.Cleanup(unmount)
	return unmount
}

// unmountStale unmounts what killed runs have left.
func unmountStale(t *testing.T) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		source, rest, _ := strings.Cut(line, " ")
		dir, _, _ := strings.Cut(rest, " ")
		pid, err := strconv.Atoi(strings.TrimPrefix(source, staleSource))
		if !strings.HasPrefix(source, staleSource) || err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		t.Logf("unmounting %s of a killed test: %v", dir, unix.Unmount(dir, unix.MNT_DETACH))
	}
}

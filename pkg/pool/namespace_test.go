package pool

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain runs the tests in a mount namespace of their own: what they mount goes with them, however they end.
func TestMain(m *testing.M) {
	const inside = "POOL_TEST_NAMESPACE"
	if os.Getenv(inside) == "" {
		fmt.Fprintln(os.Stderr, "private mount namespace:", enterNamespace(append(os.Environ(), inside+"=1")))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// enterNamespace starts this program anew, in the same process; it returns only if that fails.
func enterNamespace(env []string) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := leaveLoopMounts(); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, env)
}

// leaveLoopMounts detaches the mounts of loop devices that this namespace has inherited: they belong to tests
// that run beside these, and would keep their devices busy when those tests have unmounted them.
func leaveLoopMounts() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		about, source, _ := strings.Cut(line, " - ")
		fields := strings.Fields(about)
		if len(fields) < 5 || !strings.Contains(source, " /dev/loop") {
			continue
		}
		if err := unix.Unmount(fields[4], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detach %s: %w", fields[4], err)
		}
	}
	return nil
}

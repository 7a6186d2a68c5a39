package pool

import (
	"fmt"
	"os"
	"runtime"
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
	return unix.Exec("/proc/self/exe", os.Args, env)
}

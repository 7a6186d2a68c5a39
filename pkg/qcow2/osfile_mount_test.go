package qcow2

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts an empty tmpfs for the duration of a test.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("qcow2-osfile-test", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	unmountAfter(t, dir)
	return dir
}

// mountImage mounts a new file system on a loop device, which goes with the mount.
func mountImage(t *testing.T, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 320<<20); err != nil { // XFS wants 300 MiB
		t.Fatal(err)
	}
	runTool(t, append(mkfs, image)...)
	dir := t.TempDir()
	runTool(t, "mount", "-o", "loop", image, dir)
	unmountAfter(t, dir)
	return dir
}

func unmountAfter(t *testing.T, dir string) {
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func runTool(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
}

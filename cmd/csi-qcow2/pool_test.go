package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPoolInit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := mustRun(t, "pool", "init", dir)
	if again := mustRun(t, "pool", "init", dir); again != first {
		t.Errorf("first it was %q, then %q", first, again)
	}
	if _, err := os.Stat(filepath.Join(dir, "pool.json")); err != nil {
		t.Error(err)
	}
}

// A directory whose disk is not mounted is not taken; one at which something is mounted is.
func TestPoolInitRequireMount(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if r := run(t, "pool", "init", "--require-mount", dir); r.status == 0 {
		t.Error("a directory that nothing is mounted at was taken")
	}
	if _, err := os.Stat(filepath.Join(dir, "pool.json")); !os.IsNotExist(err) {
		t.Errorf("pool.json in a refused directory: %v", err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	mustRun(t, "pool", "init", "--require-mount", dir)
}

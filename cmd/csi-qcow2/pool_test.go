package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
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

// Two machines that are copies of each other have one pool, until one of them is told what it is.
func TestPoolOfACopiedMachine(t *testing.T) {
	t.Parallel()
	dir, clone := filepath.Join(t.TempDir(), "pool"), filepath.Join(t.TempDir(), "pool")
	uuid := func(output, dir string) string { return strings.TrimPrefix(output, dir+" is pool ") }
	first := uuid(mustRun(t, "pool", "init", "--node-id", "node-a", dir), dir)
	if out, err := exec.Command("cp", "-a", dir, clone).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if again := uuid(mustRun(t, "pool", "init", "--node-id", "node-b", clone), clone); again != first {
		t.Errorf("init has changed a pool: %q, was %q", again, first)
	}
	refused := func(dir, node string) bool {
		t.Helper()
		_, err := pool.OpenOn(dir, node)
		return errors.Is(err, pool.ErrForeign)
	}
	if !refused(clone, "node-b") || !refused(clone, "node-a") {
		t.Error("a copy is served")
	}
	if own := uuid(mustRun(t, "pool", "init", "--new-uuid", clone), clone); own == first {
		t.Errorf("the copy is still pool %s", own)
	}
	if refused(clone, "node-b") || refused(dir, "node-a") || !refused(dir, "node-b") {
		t.Error("the copy is not node-b's, or the original not node-a's")
	}
	if out := uuid(mustRun(t, "pool", "adopt", "--node-id", "node-b", dir), dir); out != first {
		t.Errorf("adopted as %q, was %q", out, first)
	}
	if refused(dir, "node-b") || !refused(dir, "node-a") {
		t.Error("an adopted pool is not the new node's")
	}
}

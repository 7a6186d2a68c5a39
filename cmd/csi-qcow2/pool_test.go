package main

import (
	"os"
	"path/filepath"
	"testing"
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

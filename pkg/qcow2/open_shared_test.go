package qcow2

import (
	"path/filepath"
	"testing"
)

// TestOpenShared: who opens an image that another writes sees each of its snapshots, and is told when one that it reads is
// deleted, or replaced by another of the same name.
func TestOpenShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.qcow2")
	f, err := CreateFile(path)
	must(t, err)
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	writer, err := Open(f, OpenOptions{})
	must(t, err)
	defer writer.Close()
	before, err := OpenShared(path)
	must(t, err)
	defer before.Close()
	taken, err := writer.CreateSnapshot(t.Context(), "s", nil)
	must(t, err)
	changed, err := before.Changed()
	must(t, err)
	after, err := OpenShared(path)
	must(t, err)
	defer after.Close()
	if !changed || len(before.Snapshots()) != 0 || len(after.Snapshots()) != 1 {
		t.Errorf("changed: %v, snapshots: %v, then %v", changed, before.Snapshots(), after.Snapshots())
	}
	kept := func(want bool) {
		t.Helper()
		if got, err := SnapshotKept(path, taken); err != nil || got != want {
			t.Errorf("kept: %v, %v", got, err)
		}
	}
	kept(true)
	must(t, writer.DeleteSnapshot(t.Context(), ByName("s")))
	kept(false)
	_, err = writer.CreateSnapshot(t.Context(), "s", nil)
	must(t, err)
	kept(false)
}

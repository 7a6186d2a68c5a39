package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCompletion: a shell is told the names of snapshots, also of an image in use, and the values of flags.
func TestCompletion(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	mustRun(t, "image", "snapshot", "create", image, "before-upgrade")
	holdWithQEMU(t, image)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"image", "snapshot", "goto", image, ""}, "before-upgrade"},
		{[]string{"image", "snapshot", "delete", image, ""}, "before-upgrade"},
		{[]string{"image", "snapshot", "rename", image, ""}, "before-upgrade"},
		{[]string{"image", "snapshot", "diff", image, "monday", ""}, "before-upgrade"},
		{[]string{"image", "export", image, "out", "--snapshot", ""}, "before-upgrade"},
		{[]string{"image", "check", "--repair", ""}, "leaks"},
		{[]string{"image", "info", "-o", ""}, "json"},
		{[]string{"image", "create", "--preallocation", ""}, "falloc"},
		{[]string{"image", "snap"}, "snapshot"},
	} {
		if got := mustRun(t, append([]string{"__complete"}, tt.args...)...); !strings.Contains(got, tt.want) {
			t.Errorf("%v: %q, want %s", tt.args, got, tt.want)
		}
	}
	if got := mustRun(t, "__complete", "image", "snapshot", "create", image, ""); strings.Contains(got, "before") {
		t.Errorf("for a new name: %q", got)
	}
}

// TestManual: each command that people use has a page, which man(1) has nothing against.
func TestManual(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mustRun(t, "man", dir)
	for name, want := range map[string][]string{
		"csi-qcow2":                       {`.BR csi\-qcow2\-image (1)`},
		"csi-qcow2-image-snapshot-rename": {`.B \-\-id`, "before\\-upgrade", ".SH SYNOPSIS"},
	} {
		page, err := os.ReadFile(filepath.Join(dir, name+".1"))
		must(t, err)
		for _, want := range want {
			if !strings.Contains(string(page), want) {
				t.Errorf("%s has no %q:\n%s", name, want, page)
			}
		}
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	must(t, err)
	if len(pages) < 20 {
		t.Errorf("only %d pages", len(pages))
	}
	for _, page := range pages {
		if strings.Contains(page, "worker") || strings.Contains(page, "helper") {
			t.Errorf("%s is of no use to people", page)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	if got := mustRun(t, "version"); !strings.HasPrefix(got, "csi-qcow2 unknown (go") {
		t.Errorf("%q", got)
	}
}

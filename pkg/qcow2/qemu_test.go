package qcow2

import (
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// This file runs QEMU's tools, the oracle of this package's tests. A missing tool is a failure.

// qemuImg runs qemu-img and returns its output; it fails the test unless the exit status is 0.
func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	return qemuTool(t, "qemu-img", args...)
}

// qemuIO runs the commands on the image at path. Exit status and output tell about failure: qemu-io
// reports some errors in its output only.
func qemuIO(t testing.TB, path string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := qemuTool(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "Input/output error") {
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
	return out
}

func qemuTool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// qemuCheck is what `qemu-img check --output=json` says.
type qemuCheck struct {
	Corruptions int64 `json:"corruptions"`
	Leaks       int64 `json:"leaks"`
	CheckErrors int64 `json:"check-errors"`
	ImageEnd    int64 `json:"image-end-offset"`
	Total       int64 `json:"total-clusters"`
	Allocated   int64 `json:"allocated-clusters"`

	exit   int
	output string // the messages and the JSON
}

// runQemuCheck checks the image at path and accepts every verdict.
func runQemuCheck(t testing.TB, path string) qemuCheck {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", "--output=json", path)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	c := qemuCheck{exit: cmd.ProcessState.ExitCode(), output: stderr.String() + string(out)}
	if len(out) > 0 {
		if err := json.Unmarshal(out, &c); err != nil {
			t.Fatalf("qemu-img check %s: %v\n%s", path, err, c.output)
		}
	}
	return c
}

// tempImage returns a path in a directory of the test's own.
func tempImage(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "image.qcow2")
}

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// asProgram makes the test's binary behave as csi-qcow2.
const asProgram = "CSI_QCOW2_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// result is what a run of the program said, and its exit status.
type result struct {
	stdout, stderr string
	status         int
}

// program is a run of csi-qcow2 that has not begun.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	return cmd
}

// run runs csi-qcow2 to its end.
func run(t *testing.T, args ...string) result {
	t.Helper()
	return runWith(t, "", args...)
}

func runWith(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := program(t, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("csi-qcow2 %s: %v", strings.Join(args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// mustRun runs csi-qcow2, which must succeed, and returns its output.
func mustRun(t *testing.T, args ...string) string {
	t.Helper()
	return mustRunWith(t, "", args...)
}

func mustRunWith(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	r := runWith(t, stdin, args...)
	if r.status != 0 {
		t.Fatalf("csi-qcow2 %s: exit status %d\n%s", strings.Join(args, " "), r.status, r.stderr)
	}
	return r.stdout
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// qemu runs one of QEMU's tools, which must succeed, and returns its output.
func qemu(t *testing.T, tool string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), tool, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// qemuIO runs commands of qemu-io on an image; a pattern that is not there is an error.
func qemuIO(t *testing.T, image string, commands ...string) {
	t.Helper()
	args := []string{image}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := qemu(t, "qemu-io", args...); strings.Contains(out, "failed") {
		t.Fatalf("qemu-io %s:\n%s", strings.Join(args, " "), out)
	}
}

// verify checks an image with both checkers.
func verify(t *testing.T, image string) {
	t.Helper()
	qemu(t, "qemu-img", "check", image)
	mustRun(t, "image", "check", image)
}

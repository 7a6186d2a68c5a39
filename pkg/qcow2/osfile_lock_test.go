package qcow2

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// newQEMUImage makes a small image with a snapshot.
func newQEMUImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	runTool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	runTool(t, "qemu-img", "snapshot", "-c", "first", path)
	return path
}

// qemuHolds keeps an image open in a qemu-io process until release is called, or the test ends.
func qemuHolds(t *testing.T, path string, options ...string) (release func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-io", append(options, path)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	released := false
	release = func() {
		if released {
			return
		}
		released = true
		if err := errors.Join(stdin.Close(), drainPipe(stdout), cmd.Wait()); err != nil {
			t.Errorf("qemu-io: %v", err)
		}
	}
	t.Cleanup(release)
	if _, err := bufio.NewReaderSize(stdout, 16).ReadString('>'); err != nil { // its prompt: the image is open
		t.Fatalf("qemu-io does not open %s: %v", path, err)
	}
	return release
}

func drainPipe(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

func openOSFile(t *testing.T, path string, readOnly bool) File {
	t.Helper()
	f, err := OpenFile(path, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func closeOSFile(t *testing.T, f File) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// wantOpen opens a file and compares how that ends.
func wantOpen(t *testing.T, path string, readOnly bool, want error) {
	t.Helper()
	f, err := OpenFile(path, readOnly)
	if err == nil {
		defer closeOSFile(t, f)
	}
	if !errors.Is(err, want) {
		t.Errorf("OpenFile(readOnly %t) = %v, want %v", readOnly, err, want)
	}
}

// qemuTools are the commands that must not get at an image that we write; reading says which may at one that we read.
func qemuTools(path, out string) []struct {
	args    []string
	reading bool
} {
	return []struct {
		args    []string
		reading bool
	}{
		{[]string{"qemu-img", "info", path}, true},
		{[]string{"qemu-img", "check", path}, true},
		{[]string{"qemu-img", "map", path}, true},
		{[]string{"qemu-img", "snapshot", "-l", path}, true},
		{[]string{"qemu-img", "convert", "-O", "raw", path, out}, true},
		{[]string{"qemu-io", "-r", "-c", "read 0 512", path}, true},
		{[]string{"qemu-img", "snapshot", "-c", "more", path}, false},
		{[]string{"qemu-img", "snapshot", "-d", "first", path}, false},
		{[]string{"qemu-img", "snapshot", "-a", "first", path}, false},
		{[]string{"qemu-img", "check", "-r", "all", path}, false},
		{[]string{"qemu-img", "resize", path, "2M"}, false},
		{[]string{"qemu-img", "create", "-f", "qcow2", path, "1M"}, false},
		{[]string{"qemu-io", "-c", "write 0 512", path}, false},
	}
}

func TestQEMUKeepsOffWhatWeHold(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		path := newQEMUImage(t)
		f := openOSFile(t, path, readOnly)
		for _, tool := range qemuTools(path, filepath.Join(t.TempDir(), "out")) {
			out, err := exec.CommandContext(t.Context(), tool.args[0], tool.args[1:]...).CombinedOutput()
			wantOK := readOnly && tool.reading
			if ok := err == nil; ok != wantOK {
				t.Errorf("we hold it (read-only %t): %v: %v\n%s", readOnly, tool.args, err, out)
			}
			if !wantOK && !strings.Contains(string(out), "lock") {
				t.Errorf("we hold it (read-only %t): %v does not speak of a lock:\n%s", readOnly, tool.args, out)
			}
		}
		runTool(t, "qemu-img", "info", "-U", path) // an administrator who insists may look
		closeOSFile(t, f)
		runTool(t, "qemu-img", "snapshot", "-c", "after", path)
		runTool(t, "qemu-img", "check", path)
	}
}

func TestWeKeepOffWhatQEMUHolds(t *testing.T) {
	path := newQEMUImage(t)

	release := qemuHolds(t, path)
	wantOpen(t, path, false, ErrInUse)
	wantOpen(t, path, true, ErrInUse)
	release()
	wantOpen(t, path, false, nil)

	release = qemuHolds(t, path, "-r")
	wantOpen(t, path, false, ErrInUse)
	wantOpen(t, path, true, nil)
	release()
	wantOpen(t, path, false, nil)
}

func TestWeKeepOffWhatWeHold(t *testing.T) {
	path := newQEMUImage(t)

	writer := openOSFile(t, path, false)
	wantOpen(t, path, false, ErrInUse)
	wantOpen(t, path, true, ErrInUse)
	closeOSFile(t, writer)

	one, two := openOSFile(t, path, true), openOSFile(t, path, true)
	wantOpen(t, path, false, ErrInUse)
	closeOSFile(t, one)
	wantOpen(t, path, false, ErrInUse)
	closeOSFile(t, two)
	wantOpen(t, path, false, nil)
}

// An opener that was refused must leave nothing behind that would refuse the next one.
func TestRefusedOpenerLeavesNoLock(t *testing.T) {
	path := newQEMUImage(t)
	reader := openOSFile(t, path, true)
	wantOpen(t, path, false, ErrInUse)
	wantOpen(t, path, true, nil)
	runTool(t, "qemu-img", "info", path)
	closeOSFile(t, reader)
	wantOpen(t, path, false, nil)
}

func TestCreatedFileIsLocked(t *testing.T) {
	f := newOSFile(t)
	wantOpen(t, f.Name(), true, ErrInUse)
	out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-f", "qcow2", f.Name(), "1M").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("qemu-img makes an image of a file that we are just creating: %v\n%s", err, out)
	}
}

package host

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// newQEMUImage makes a small image with a snapshot.
func newQEMUImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	qemuImg(t, "snapshot", "-c", "first", path)
	return path
}

// qemuIOHolds keeps an image open in a qemu-io process until release is called, or the test ends.
func qemuIOHolds(t *testing.T, path string, options ...string) (release func()) {
	t.Helper()
	return holds(t, "qemu-io>", append(append([]string{"qemu-io"}, options...), path)...) // its prompt
}

// daemonHolds does it in a daemon that has the image but nobody to use it.
func daemonHolds(t *testing.T, path string) (release func()) {
	t.Helper()
	return holds(t, `"QMP"`, "qemu-storage-daemon", // its greeting
		"--blockdev", "driver=file,node-name=file,filename="+path,
		"--blockdev", "driver=qcow2,node-name=image,file=file",
		"--chardev", "stdio,id=stdio", "--monitor", "chardev=stdio")
}

// holds starts a program that says opened when it has the image open.
func holds(t *testing.T, opened string, command ...string) (release func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
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
	release = sync.OnceFunc(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill() // the daemon does not end with its monitor
		_, _ = io.Copy(io.Discard, stdout)
		_ = cmd.Wait()
	})
	t.Cleanup(release)
	var said []byte
	for b := make([]byte, 1); !bytes.Contains(said, []byte(opened)); said = append(said, b[0]) {
		if _, err := stdout.Read(b); err != nil {
			t.Fatalf("%v does not open the image: %v\n%s", command, err, said)
		}
	}
	return release
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
		qemuImg(t, "info", "-U", path) // an administrator who insists may look
		closeOSFile(t, f)
		qemuImg(t, "snapshot", "-c", "after", path)
		qemuImg(t, "check", path)
	}
}

func TestWeKeepOffWhatQEMUHolds(t *testing.T) {
	path := newQEMUImage(t)

	for _, start := range []func() func(){
		func() func() { return qemuIOHolds(t, path) },
		func() func() { return daemonHolds(t, path) },
	} {
		release := start()
		wantOpen(t, path, false, ErrInUse)
		wantOpen(t, path, true, ErrInUse)
		release()
		wantOpen(t, path, false, nil)
	}

	release := qemuIOHolds(t, path, "-r")
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
	qemuImg(t, "info", path)
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

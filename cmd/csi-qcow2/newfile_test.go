package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestKilledHalfway ends imports and exports amid their work: nothing is left under the name that the result was to have, nor
// under any other, and the same command succeeds afterwards.
func TestKilledHalfway(t *testing.T) {
	t.Parallel()
	// A test that was started by nohup would pass on that the hangup is ignored.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "in.raw"), filepath.Join(dir, "in.qcow2")
	content := bytes.Repeat([]byte("not zeros"), 96<<20/9)
	must(t, os.WriteFile(raw, content, 0o600))
	mustRun(t, "image", "import", raw, image)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGHUP, syscall.SIGTERM} {
		for _, args := range [][]string{{"image", "import", raw}, {"image", "export", image}} {
			t.Run(fmt.Sprint(args[1], " ", sig), func(t *testing.T) {
				into := t.TempDir()
				out := filepath.Join(into, "out")
				cmd := program(t, append(args, out)...)
				must(t, cmd.Start())
				for written(t, cmd) < 4<<20 {
					if cmd.ProcessState != nil {
						t.Fatal("it ended before it could be killed")
					}
				}
				must(t, cmd.Process.Signal(sig))
				if err := cmd.Wait(); err == nil {
					t.Fatal("it ended before it was killed")
				}
				if left, err := os.ReadDir(into); err != nil || len(left) > 0 {
					t.Errorf("it left %v, %v", left, err)
				}
				mustRun(t, append(args, out)...)
				format := map[string]string{"import": "qcow2", "export": "raw"}[args[1]]
				qemu(t, "qemu-img", "compare", "-f", "raw", "-F", format, raw, out)
			})
		}
	}
}

// written returns how many bytes a process has written so far.
func written(t *testing.T, cmd *exec.Cmd) (n int64) {
	t.Helper()
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", cmd.Process.Pid))
	must(t, err)
	_, after, _ := strings.Cut(string(io), "wchar: ")
	_, err = fmt.Sscan(after, &n)
	must(t, err)
	return n
}

// TestPartialFile: where a file must have a name, it has another one until it is whole, two processes do not make it at once,
// and what one that died has left is used again.
func TestPartialFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new")
	dead, err := createPartial(path)
	must(t, err)
	_, err = dead.WriteString("half of it")
	must(t, err)
	if _, err := createPartial(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second one at the same time: %v", err)
	}
	must(t, dead.Close()) // as the kernel does

	n, err := createPartial(path)
	must(t, err)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it has its name before it is whole: %v", err)
	}
	_, err = n.WriteString("all")
	must(t, err)
	must(t, n.keep())
	must(t, n.close())
	if got, err := os.ReadFile(path); err != nil || string(got) != "all" {
		t.Errorf("the file holds %q, %v", got, err)
	}

	failed, err := createPartial(path + "2")
	must(t, err)
	must(t, failed.close())
	late, err := createPartial(path)
	must(t, err)
	if err := late.keep(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("it takes the place of another file: %v", err)
	}
	must(t, late.close())
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestExportDevice exports to a block device: the disk, its zeros included, replaces what was there.
func TestExportDevice(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image, backing := filepath.Join(dir, "x.qcow2"), filepath.Join(dir, "device")
	mustRun(t, "image", "create", image, "8M")
	qemuIO(t, image, "write -P 1 1M 64K", "write -P 2 7M 1M")
	must(t, os.WriteFile(backing, bytes.Repeat([]byte{9}, 10<<20), 0o600))
	device := strings.TrimSpace(qemu(t, "losetup", "--find", "--show", backing))
	t.Cleanup(func() { must(t, exec.Command("losetup", "--detach", device).Run()) })

	if r := run(t, "image", "export", image, device); r.status != 1 || !strings.Contains(r.stderr, "--force overwrites") {
		t.Errorf("without --force: %+v", r)
	}
	mustRun(t, "image", "export", "--force", image, device)
	got, err := os.ReadFile(device)
	must(t, err)
	want := make([]byte, 10<<20)
	for at, b := range map[int]byte{1 << 20: 1, 7 << 20: 2, 8 << 20: 9} {
		copy(want[at:], bytes.Repeat([]byte{b}, map[byte]int{1: 64 << 10, 2: 1 << 20, 9: 2 << 20}[b]))
	}
	if !bytes.Equal(got, want) {
		t.Error("the device holds something else")
	}
	mustRun(t, "image", "resize", image, "+8M")
	if r := run(t, "image", "export", "--force", image, device); r.status != 1 || !strings.Contains(r.stderr, "make the device larger") {
		t.Errorf("to a device that is too small: %+v", r)
	}
}

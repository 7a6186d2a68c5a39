package main

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestErrors checks that what cannot be done says so, with exit status 1, or 2 if the command line is wrong, and changes
// nothing.
func TestErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	mustRun(t, "image", "create", path("image"), "1M")
	for name, content := range map[string]string{"text": "just text", "empty": ""} {
		if err := os.WriteFile(path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused := map[int]map[string]string{2: {
		"image create NEW 1X":        `"1X" is not a size`,
		"image create NEW -- -1M":    `"-1M" is not a size`,
		"image create NEW 9000P":     "too large",
		"image create NEW":           "usage: csi-qcow2 image create FILE SIZE",
		"image info image -o yaml":   "neither table nor json",
		"image nothing":              `has no command "nothing"`,
		"nothing":                    `has no command "nothing"`,
		"engine":                     "--listen, --pool must be given",
		"node":                       "--pool, --engine must be given",
		"image chekc image":          "did you mean check?",
		"image snapshto":             "did you mean snapshot?",
		"image info image --nothing": "unknown flag: --nothing",
		"image create NEW 1GB":       `"1GB" is not a size`,
		"node --overcommit 0":        `"0" is not a ratio`,
		"node --overcommit NaN":      `"NaN" is not a ratio`,
	}, 1: {
		"image check":                             "usage: csi-qcow2 image check FILE", // 2 would mean corrupt
		"image check image --nothing":             "unknown flag",
		"image info NONE":                         "no such file",
		"image check NONE":                        "no such file",
		"image io NONE":                           "no such file",
		"image snapshot list NONE":                "no such file",
		"image info text":                         "not a qcow2 image",
		"image info empty":                        "not a qcow2 image",
		"image check text":                        "not a qcow2 image",
		"image info .":                            "not a regular file",
		"image info fifo":                         "not a regular file",
		"image create text 1M":                    "is there already",
		"image create NEW 1M --cluster-size 1000": "cluster size 1000",
		"image create NEW 1M --cluster-size 4M":   "cluster size 4194304",
		"image create NEW 1M --version 4":         "version 4",
		"image create NEW 8191P":                  "L1 table",
		"image create none/NEW 1M":                "no such file",
		"image import NONE NEW":                   "no such file",
		"image import fifo NEW":                   "neither a regular file nor a block device",
		"image import text image":                 "is there already",
		"image import text text":                  "is there already",
		"image export image text":                 "is there already",
		"image export image NEW --snapshot x":     "not found",
		"image export text NEW":                   "not a qcow2 image",
		"image map image --snapshot x":            "not found",
		"image snapshot goto image x":             "not found",
		"image snapshot delete image x":           "not found",
		"image resize image 0":                    "",
		"pool init text":                          "not a directory",
	}}
	for status, commands := range refused {
		for args, want := range commands {
			t.Run(args, func(t *testing.T) {
				cmd := program(t, strings.Fields(args)...)
				cmd.Dir = dir
				out, _ := cmd.CombinedOutput()
				if got := cmd.ProcessState.ExitCode(); got != status || !strings.HasPrefix(string(out), "csi-qcow2: ") ||
					!strings.Contains(string(out), want) {
					t.Errorf("exit status %d, want %d and %q: %s", got, status, want, out)
				}
				if _, err := os.Lstat(path("NEW")); err == nil {
					t.Error("it left a file")
				}
			})
		}
	}
	for name, content := range map[string]string{"text": "just text", "empty": ""} {
		if got, err := os.ReadFile(path(name)); err != nil || string(got) != content {
			t.Errorf("%s was changed: %q, %v", name, got, err)
		}
	}
	verify(t, path("image"))
}

// TestInUse checks that an image that QEMU has open for writing is refused.
func TestInUse(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "1M")
	holdWithQEMU(t, image)
	for _, args := range [][]string{{"info", image}, {"check", image}, {"resize", image, "2M"}, {"snapshot", "create", image, "s"}, {"io", image}} {
		r := run(t, append([]string{"image"}, args...)...)
		if r.status != 1 || !strings.Contains(r.stderr, "x.qcow2 is in use by qemu-io (PID ") {
			t.Errorf("image %v: %+v", args, r)
		}
	}
}

// holdWithQEMU opens an image with QEMU until the test ends.
func holdWithQEMU(t *testing.T, image string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-io", image)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	// It answers when it has opened the image.
	if _, err := in.Write([]byte("read 0 512\n")); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "read 512/512 bytes") {
			return
		}
	}
	t.Fatal("qemu-io did not open the image")
}

// TestNoSpace checks that a full disk is reported, and that no half image is left on it.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	small := t.TempDir()
	if err := unix.Mount("csi-qcow2-test", small, "tmpfs", 0, "size=4M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "in.raw"), filepath.Join(dir, "x.qcow2")
	rawFile(t, raw, 200<<20)
	mustRun(t, "image", "import", raw, image)
	for _, args := range [][]string{
		{"import", raw, filepath.Join(small, "new")},
		{"export", image, filepath.Join(small, "new")},
	} {
		r := run(t, append([]string{"image"}, args...)...)
		if r.status != 1 || !strings.Contains(r.stderr, "no space left") {
			t.Errorf("image %v: %+v", args, r)
		}
		if left, err := os.ReadDir(small); err != nil || len(left) > 0 {
			t.Errorf("image %v left %v, %v", args, left, err)
		}
	}
}

// TestInterrupt checks that a signal ends work and leaves nothing half done.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "x.qcow2")
	mustRun(t, "image", "create", image, "64M")
	cmd := program(t, "image", "io", image)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("write 0 1M 7\nread 0 1\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil { // the read has been carried out
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	verify(t, image)
	qemuIO(t, image, "read -P 7 0 1M")
}

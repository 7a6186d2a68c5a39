package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"
)

// smallTree makes a directory with enough files for a snapshot in the middle of their copying.
func smallTree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for i := range 900 {
		dir := filepath.Join(root, fmt.Sprint(i%7))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		content := bytes.Repeat([]byte{byte(i)}, i*37)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("0/0", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestDemo plays the demonstration with a small tree.
func TestDemo(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	out := mustRun(t, "demo", "--dir", dir, "--source", smallTree(t))
	for line := range strings.Lines(out) {
		if line = strings.TrimSuffix(line, "\n"); utf8.RuneCountInString(line) > 80 || strings.ContainsAny(line, "\x1b\r") {
			t.Errorf("not a line of 80 columns without colours: %q", line)
		}
	}
	for _, want := range []string{"900 files", "all equal", "$ csi-qcow2 volume list\n", "image snapshot goto", "$ qemu-img snapshot -l", "What was proved", "after-the-copy", "3 snapshots, 7 volumes", "No mount, device, process or file is left."} {
		if !strings.Contains(out, want) {
			t.Errorf("it did not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
	checkNothingLeft(t, dir)
}

// TestDemoKeep: with --keep there is a shell in which the commands find pool and engine, and everything goes with it. With --pause
// each step waits for a line, or for the end of them.
func TestDemoKeep(t *testing.T) {
	dir := shortDir(t)
	t.Setenv("SHELL", "/bin/sh")
	commands := strings.Repeat("\n", 3) // of which there are fewer than steps
	out := mustRunWith(t, commands, "demo", "--dir", dir, "--source", smallTree(t), "--pause")
	if got := strings.Count(out, "[Enter]"); got != 4 {
		t.Errorf("it waited %d times for 3 lines and their end", got)
	}
	checkNothingLeft(t, dir)
	out = mustRunWith(t, "csi-qcow2 volume show files-again; ls ../files-again/volume; false\n", "demo", "--dir", dir, "--source", smallTree(t), "--keep")
	if !strings.Contains(out, "attached as /dev/loop") || !strings.Contains(out, "\nlink\n") || !strings.Contains(out, "3 snapshots, 7 volumes") {
		t.Errorf("in the shell:\n%s", out)
	}
	checkNothingLeft(t, dir)
}

// TestDemoInterrupted checks that a demonstration that is interrupted leaves nothing behind either.
func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	cmd := program(t, "demo", "--dir", dir, "--source", smallTree(t))
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		fmt.Fprintln(&out, lines.Text())
		if strings.Contains(lines.Text(), "restore the snapshot") {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != 1 || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("exit status %d, %s\n%s", status, stderr.String(), out.String())
	}
	checkNothingLeft(t, dir)
}

// shortDir returns a directory whose path leaves room for the names of sockets, which end at 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "csiq-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func checkNothingLeft(t *testing.T, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("a mount is left (%v):\n%s", err, mounts)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestReadme types the lines of README.md that need nothing but this program, in the order in which they are there.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	must(t, err)
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "bin"), 0o755))
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(self, filepath.Join(dir, "bin", "csi-qcow2")))
	must(t, os.WriteFile(filepath.Join(dir, "README.md"), readme, 0o600))
	lines := regexp.MustCompile(`(?m)^(echo .*\| csi-qcow2|(bin/)?csi-qcow2 image) .*$`).FindAllString(string(readme), -1)
	if len(lines) < 15 {
		t.Fatalf("only %d commands were found", len(lines))
	}
	lines = append(lines, "bin/csi-qcow2 image export /tmp/restored.qcow2 - | head -c $(stat -c %s README.md) | cmp - README.md")
	shell := exec.CommandContext(t.Context(), "sh", "-e", "-c", strings.ReplaceAll(strings.Join(lines, "\n"), "/tmp/", dir+"/bin/"))
	shell.Dir, shell.Env = dir, append(os.Environ(), asProgram+"=1", "PATH="+dir+"/bin:"+os.Getenv("PATH"))
	if out, err := shell.CombinedOutput(); err != nil {
		t.Errorf("%v:\n%s\n%s", err, strings.Join(lines, "\n"), out)
	}
}

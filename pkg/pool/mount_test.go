package pool

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// staleSource is the source of mounts of these tests; a process ID follows.
const staleSource = "pool-test-"

// mountOver mounts an empty tmpfs over a directory; unmount takes it away before the test ends.
func mountOver(t *testing.T, dir string) (unmount func()) {
	t.Helper()
	unmountStale(t)
	must(t, unix.Mount(staleSource+strconv.Itoa(os.Getpid()), dir, "tmpfs", 0, ""))
	unmount = sync.OnceFunc(func() { must(t, unix.Unmount(dir, 0)) })
	t.Cleanup(unmount)
	return unmount
}

// unmountStale unmounts what killed runs have left.
func unmountStale(t *testing.T) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		source, rest, _ := strings.Cut(line, " ")
		dir, _, _ := strings.Cut(rest, " ")
		pid, err := strconv.Atoi(strings.TrimPrefix(source, staleSource))
		if !strings.HasPrefix(source, staleSource) || err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		t.Logf("unmounting %s of a killed test: %v", dir, unix.Unmount(dir, unix.MNT_DETACH))
	}
}

package main

import (
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Pods' writes go through these processes: whoever needs memory may have to write to a volume first. So they must not wait
// for memory themselves, and not be the ones that are killed for it.

// workerMemoryLimit is what a worker's heap is kept below, in bytes, if that is possible: its cache of mappings is 32 MiB.
const workerMemoryLimit = 160 << 20

// protectMemory keeps in memory what this process has touched, and makes the kernel kill another process when there is no
// memory left. What is refused is logged: only that guarantee is missing then.
func protectMemory() {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		klog.InfoS("Memory can be paged out", "reason", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		klog.InfoS("The kernel may kill this process when memory is short", "reason", err)
	}
}

// unmapProgram gives up the pages of the program's file that this process has mapped, most of them when it started. What is
// used again comes from the page cache, and is kept as before.
func unmapProgram() {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	for line := range strings.Lines(string(maps)) {
		var from, to, offset uintptr
		var mode, device, path string
		var inode uint64
		_, err := fmt.Sscanf(line, "%x-%x %s %x %s %d %s", &from, &to, &mode, &offset, &device, &inode, &path)
		if err != nil || path != self || strings.Contains(mode, "w") {
			continue
		}
		// Locked memory is not given up, so it is unlocked meanwhile. Where that fails, all stays as it is.
		_, _, _ = unix.Syscall(unix.SYS_MUNLOCK, from, to-from, 0)
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
		_, _, _ = unix.Syscall(unix.SYS_MLOCK2, from, to-from, unix.MLOCK_ONFAULT)
	}
}

// limitMemory makes the garbage collector work harder near a limit, unless GOMEMLIMIT says another one.
func limitMemory(bytes int64) {
	if debug.SetMemoryLimit(-1) == math.MaxInt64 {
		debug.SetMemoryLimit(bytes)
	}
}

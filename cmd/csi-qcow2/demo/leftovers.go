package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
)

// settleTime is how long the kernel may take to free a device after its last user has gone.
const settleTime = 10 * time.Second

// leftovers returns an error that names the mounts, loop devices and processes of this world that are
// still there, and removes them.
func (w *world) leftovers(ctx context.Context) error {
	deadline := time.NewTimer(settleTime)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		left := w.left()
		if left == nil {
			return nil
		}
		select {
		case <-tick.C:
			continue
		case <-deadline.C:
		case <-ctx.Done():
		}
		return errors.Join(left, w.force())
	}
}

// force kills the processes and removes the devices that should not be there any more.
func (w *world) force() error {
	var failures []error
	for _, pid := range processesWith(w.mark()) {
		failures = append(failures, unix.Kill(pid, unix.SIGKILL))
	}
	for device, name := range w.loopDevices() {
		failures = append(failures, blockdev.Clear(device, name))
	}
	return errors.Join(failures...)
}

func (w *world) left() error {
	var left []error
	for _, point := range mountsBelow(w.dir) {
		left = append(left, fmt.Errorf("left behind: mount %s", point))
	}
	for device := range w.loopDevices() {
		left = append(left, fmt.Errorf("left behind: %s", device))
	}
	for _, pid := range processesWith(w.mark()) {
		left = append(left, fmt.Errorf("left behind: process %d", pid))
	}
	return errors.Join(left...)
}

// mountsBelow returns the mount points below dir, the latest first.
func mountsBelow(dir string) []string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append([]string{fields[4]}, points...)
		}
	}
	return points
}

// unmountBelow unmounts what is mounted below dir.
func unmountBelow(dir string) error {
	var failures []error
	for _, point := range mountsBelow(dir) {
		if err := unix.Unmount(point, 0); err != nil {
			failures = append(failures, fmt.Errorf("unmount %s: %w", point, err), unix.Unmount(point, unix.MNT_DETACH))
		}
	}
	return errors.Join(failures...)
}

// loopDevices returns the loop devices of this pool's volumes: the name of their file holds a volume ID,
// which holds the pool's UUID. It returns their names by path.
func (w *world) loopDevices() map[string]string {
	if w.pool == nil {
		return nil
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil
	}
	devices := map[string]string{}
	for _, file := range files {
		name, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(name), "-"+w.pool.UUID()[:8]+"-") {
			devices["/dev/"+strings.Split(file, "/")[3]] = strings.Trim(string(name), "/\n")
		}
	}
	return devices
}

// processesWith returns the processes that have mark in their environment.
func processesWith(mark string) []int {
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil
	}
	var pids []int
	for _, file := range files {
		environ, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(append(environ, 0), append([]byte(mark), 0)) {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(file, "/")[2]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

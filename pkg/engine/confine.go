package engine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/thread"
)

// What a process of the engine's may do beyond what belongs to root: mount its FUSE device or freeze a file system, and, for
// a worker, be an I/O flusher, whose requests wait for no other's memory. Bit n is capability n.
const (
	workerCapabilities uint64 = helperCapabilities | 1<<unix.CAP_SYS_RESOURCE
	helperCapabilities uint64 = 1 << unix.CAP_SYS_ADMIN
)

// startConfined starts a process, which never has other capabilities than these.
func startConfined(cmd *exec.Cmd, capabilities uint64) error {
	return thread.Run(func() error {
		if err := confine(capabilities); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		return cmd.Start()
	})
}

// confine bounds what programs may have that this thread starts.
func confine(capabilities uint64) error {
	for c := uintptr(0); ; c++ {
		if capabilities>>c&1 == 1 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		switch {
		case errors.Is(err, unix.EINVAL): // there is no other
			return inheritNone()
		case errors.Is(err, unix.EPERM): // whoever started the engine has confined it
			return nil
		case err != nil:
			return os.NewSyscallError("prctl", err)
		}
	}
}

// inheritNone leaves the bounds as the only source of capabilities.
func inheritNone() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return os.NewSyscallError("capset", unix.Capset(&h, &data[0]))
}

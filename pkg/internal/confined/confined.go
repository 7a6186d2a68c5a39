// Package confined starts the engine's processes with few capabilities.
package confined

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/thread"
)

// Capabilities are what a worker or helper may do beyond what belongs to root: mount a FUSE device and freeze a file system;
// keep its memory, be spared when there is none left, and be an I/O flusher, whose requests wait for no other's memory. Bit n
// is capability n.
const Capabilities uint64 = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_IPC_LOCK | 1<<unix.CAP_SYS_RESOURCE

// Start starts a process, which never has other capabilities than these.
func Start(cmd *exec.Cmd) error {
	return thread.Run(func() error {
		if err := confine(); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		return cmd.Start()
	})
}

// confine bounds what programs may have that this thread starts.
func confine() error {
	for c := uintptr(0); ; c++ {
		if Capabilities>>c&1 == 1 {
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

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/confined"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

// Whoever syncs, freezes or thaws the file system on a volume, or opens the volume's device, may have to wait for the
// volume's worker, or for a process that uses the volume. No signal ends that, and a process with a thread that waits so
// keeps all its files and locks, also when it is killed. So none of the engine's threads does it, but a helper: a process
// that has nothing but a directory of that file system. One that does not answer in time is left alone. It sees that its
// connection to the engine has ended as soon as it can do anything, thaws what it has frozen, and ends.

// helperDirFD is the descriptor on which a helper inherits the directory, if it gets one.
const helperDirFD = 3

// Operations of a helper, which does one after the other.
const (
	helperSync   = "sync"   // sync the directory's file system, if it is mounted from Device
	helperFreeze = "freeze" // freeze it
	helperThaw   = "thaw"   // thaw it
	// helperThawDevice thaws the file system that is mounted from Device, wherever that is.
	helperThawDevice = "thaw-device"
	helperClear      = "clear" // remove the dead devices of the name Device
	// helperRestore gives the loop device that it has instead of a directory the settings in Device, see blockdev.Restore.
	helperRestore = "restore"
)

type helperRequest struct {
	Op     string        `json:"op"`
	Device string        `json:"device,omitempty"`
	Limit  time.Duration `json:"limit,omitempty"`  // how long to wait for the next request; 0: as before
	Surely bool          `json:"surely,omitempty"` // also a freeze that has begun and is not complete
}

type helperReply struct {
	Error   string `json:"error,omitempty"`
	InUse   bool   `json:"inUse,omitempty"`   // the error is ErrInUse
	Foreign bool   `json:"foreign,omitempty"` // of helperFreeze: somebody else has frozen it already, and will thaw it
}

const maxHelperMessage = 64 << 10

// helper is the engine's end of a helper process.
type helper struct {
	pid  int
	conn *net.UnixConn
	done chan struct{} // closed when the process has ended; one that waits for I/O may never
	exit error         // nil: nothing is frozen by it; read after done
	idle bool          // it has answered all that it was asked
}

// helperPatience is how long leave waits for a helper that has nothing to do any more.
const helperPatience = time.Second

// startHelper starts a helper, which gets a copy of dir, if that is not nil. The caller ends it with leave.
func startHelper(dir *os.File) (*helper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("own executable, for a helper: %w", err)
	}
	ours, theirs, err := unixsocket.Pair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, fmt.Errorf("socket pair for a helper: %w", err)
	}
	defer theirs.Close()
	cmd := exec.Command(self, "helper")
	cmd.Dir = "/"
	cmd.Stdin = theirs // the other ones are /dev/null: who waits for the engine's output does not wait for a helper
	if dir != nil {
		cmd.ExtraFiles = []*os.File{dir} // helperDirFD
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := confined.Start(cmd); err != nil {
		ours.Close()
		return nil, fmt.Errorf("start a helper: %w", err)
	}
	h := &helper{pid: cmd.Process.Pid, conn: ours, done: make(chan struct{}), idle: true}
	go func() { // ends with the process: nobody can do more than wait for that
		defer close(h.done)
		h.exit = cmd.Wait()
		h.conn.Close()
	}()
	return h, nil
}

// call has the helper do something. When ctx ends before it is done, nothing but leave may follow.
func (h *helper) call(ctx context.Context, r helperRequest) (helperReply, error) {
	stop := context.AfterFunc(ctx, func() { _ = h.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	h.idle = false
	b, err := json.Marshal(r)
	if err == nil {
		_, err = h.conn.Write(b)
	}
	var reply helperReply
	if err == nil {
		b = make([]byte, maxHelperMessage)
		var n int
		if n, err = h.conn.Read(b); err == nil {
			err = json.Unmarshal(b[:n], &reply)
		}
	}
	h.idle = err == nil
	switch {
	case ctx.Err() != nil:
		return reply, fmt.Errorf("%s: %w", r.Op, context.Cause(ctx))
	case err != nil:
		return reply, fmt.Errorf("%s: the process that does it has ended: %w", r.Op, err)
	case reply.InUse:
		return reply, rpc.Refuse(ErrInUse, "%s", reply.Error)
	case reply.Error != "":
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}

// leave tells the helper that nothing more will come: it thaws what it has frozen, and ends. An idle one is waited for, since
// nobody can unmount the file system while it has its directory; one that still waits for a volume is not.
func (h *helper) leave() {
	_ = h.conn.CloseWrite()
	if !h.idle {
		return
	}
	select {
	case <-h.done:
	case <-time.After(helperPatience):
	}
}

// askHelper has a helper of its own do one thing without a directory.
func askHelper(ctx context.Context, r helperRequest) error {
	h, err := startHelper(nil)
	if err != nil {
		return err
	}
	defer h.leave()
	_, err = h.call(ctx, r)
	return err
}

// Package helper does what may have to wait for a volume, in a process of its own.
//
// Whoever syncs, freezes or thaws the file system on a volume, or opens the volume's device, may have to wait for the
// volume's worker, or for a process that uses the volume. No signal ends that, and a process with a thread that waits so
// keeps all its files and locks, also when it is killed. So none of the engine's threads does it, but a helper: a process
// that has nothing but a directory of that file system. One that does not answer in time is left alone. It sees that its
// connection to the engine has ended as soon as it can do anything, thaws what it has frozen, and ends.
package helper

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

// DirFD is the descriptor on which a helper inherits the directory, if it gets one.
const DirFD = 3

// Operations of a helper, which does one after the other.
const (
	Sync   = "sync"   // sync the directory's file system, if it is mounted from Device
	Freeze = "freeze" // freeze it
	Thaw   = "thaw"   // thaw it
	// ThawDevice thaws the file system that is mounted from Device, wherever that is.
	ThawDevice = "thaw-device"
	Clear      = "clear" // remove the dead devices of the name Device
	// Restore gives the loop device that it has instead of a directory the settings in Device, see blockdev.Restore.
	Restore = "restore"
)

// Request asks a helper for one operation.
type Request struct {
	Op     string        `json:"op"`
	Device string        `json:"device,omitempty"`
	Limit  time.Duration `json:"limit,omitempty"`  // how long to wait for the next request; 0: as before
	Surely bool          `json:"surely,omitempty"` // also a freeze that has begun and is not complete
}

// Reply is the answer to a Request.
type Reply struct {
	Error   string `json:"error,omitempty"`
	InUse   bool   `json:"inUse,omitempty"`   // the error is rpc.ErrInUse
	Foreign bool   `json:"foreign,omitempty"` // of Freeze: somebody else has frozen it already, and will thaw it
}

const maxMessage = 64 << 10

// Helper is the engine's end of a helper process.
type Helper struct {
	PID  int
	Done chan struct{} // closed when the process has ended; one that waits for I/O may never
	Exit error         // nil: nothing is frozen by it; read after Done
	conn *net.UnixConn
	idle bool // it has answered all that it was asked
}

// endPatience is how long End waits for a helper that has nothing to do any more.
const endPatience = time.Second

// Start starts a helper, which gets a copy of dir, if that is not nil. The caller ends it with End.
func Start(dir *os.File) (*Helper, error) {
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
		cmd.ExtraFiles = []*os.File{dir} // DirFD
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := confined.Start(cmd); err != nil {
		ours.Close()
		return nil, fmt.Errorf("start a helper: %w", err)
	}
	h := &Helper{PID: cmd.Process.Pid, conn: ours, Done: make(chan struct{}), idle: true}
	go func() { // ends with the process: nobody can do more than wait for that
		defer close(h.Done)
		h.Exit = cmd.Wait()
		h.conn.Close()
	}()
	return h, nil
}

// Call has the helper do something. When ctx ends before it is done, nothing but End may follow.
func (h *Helper) Call(ctx context.Context, r Request) (Reply, error) {
	stop := context.AfterFunc(ctx, func() { _ = h.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	h.idle = false
	b, err := json.Marshal(r)
	if err == nil {
		_, err = h.conn.Write(b)
	}
	var reply Reply
	if err == nil {
		b = make([]byte, maxMessage)
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
		return reply, rpc.Refuse(rpc.ErrInUse, "%s", reply.Error)
	case reply.Error != "":
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}

// End tells the helper that nothing more will come: it thaws what it has frozen, and ends. An idle one is waited for, since
// nobody can unmount the file system while it has its directory; one that still waits for a volume is not.
func (h *Helper) End() {
	_ = h.conn.CloseWrite()
	if !h.idle {
		return
	}
	select {
	case <-h.Done:
	case <-time.After(endPatience):
	}
}

// Ask has a helper of its own do one thing without a directory.
func Ask(ctx context.Context, r Request) error {
	h, err := Start(nil)
	if err != nil {
		return err
	}
	defer h.End()
	_, err = h.Call(ctx, r)
	return err
}

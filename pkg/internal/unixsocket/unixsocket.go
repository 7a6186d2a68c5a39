// Package unixsocket makes the unix sockets between our processes, and passes descriptors over them.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrTaken is returned by Listen when a process listens at the path, or it is that of something else than a socket.
var ErrTaken = errors.New("path of the socket is taken")

// Listen makes a socket for root alone. It replaces one that a dead process left. Its file goes when the listener is closed.
// ErrTaken.
func Listen(ctx context.Context, network, path string) (*net.UnixListener, error) {
	if err := removeStale(ctx, network, path); err != nil {
		return nil, err
	}
	// The mode that the socket has before bind is the mode of its file: it is never open to others.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	l, err := config.Listen(ctx, network, path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

func removeStale(ctx context.Context, network, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%w: %s is no socket", ErrTaken, path)
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, path)
	switch {
	case err == nil:
		return errors.Join(fmt.Errorf("%w: another process listens at %s", ErrTaken, path), conn.Close())
	case errors.Is(err, fs.ErrNotExist): // it has ended just now
		return nil
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("stale socket: %w", err)
	}
	return nil
}

// Pair returns the two ends of a connection, SOCK_STREAM or SOCK_SEQPACKET: ours, and one to be inherited by another process.
func Pair(kind int) (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "control")
	f := os.NewFile(uintptr(fds[0]), "control")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

// Descriptors returns the descriptors that came with a message, in its control messages (SCM_RIGHTS). They are the caller's,
// and closed at exec: Go receives messages so.
func Descriptors(control []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		more, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			CloseAll(fds)
			return nil, err
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

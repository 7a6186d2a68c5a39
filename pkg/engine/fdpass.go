package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

// An open directory cannot travel in a gRPC message. It comes over a second socket, path.fds, as one
// SOCK_SEQPACKET message: a token, and the descriptor beside it (SCM_RIGHTS). The answer is one message: a
// zero byte, and the reason if it was refused. A later CreateSnapshot names the token.
const (
	fdSocketSuffix = ".fds"
	maxTokenLen    = 64
	maxTokens      = 64
	// tokenLifetime is short because a held directory keeps its file system from being unmounted.
	tokenLifetime = 30 * time.Second
	fdCallTimeout = 5 * time.Second
)

// PassFD gives the engine a copy of an open directory, under a token of at most 64 bytes that a
// CreateSnapshot within half a minute names. CreateSnapshot of Client does it by itself.
func (c *Client) PassFD(ctx context.Context, token string, dir *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, fdCallTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unixpacket", c.path+fdSocketSuffix)
	if err != nil {
		return rpc.Refuse(ErrUnavailable, "%s does not answer: %w", c.path+fdSocketSuffix, errors.Unwrap(err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	reply := make([]byte, 512)
	n, err := exchangeFD(conn.(*net.UnixConn), token, dir, reply)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("the engine has not taken the file system to freeze: %w", ctx.Err())
	case err != nil:
		return rpc.Refuse(ErrUnavailable, "the engine has not taken the file system to freeze: %w", err)
	case n > 1:
		return fmt.Errorf("%w: %s", ErrFreeze, reply[1:n])
	}
	return nil
}

// exchangeFD sends the descriptor, receives the answer into reply and returns its length, at least 1.
func exchangeFD(conn *net.UnixConn, token string, dir *os.File, reply []byte) (int, error) {
	if _, _, err := conn.WriteMsgUnix([]byte(token), unix.UnixRights(int(dir.Fd())), nil); err != nil {
		return 0, err
	}
	n, err := conn.Read(reply)
	if err == nil && n == 0 {
		err = net.ErrClosed
	}
	return n, err
}

// fdStore holds the directories that were passed and not yet used: each is in a helper, and not in the engine.
type fdStore struct {
	lifetime time.Duration

	mu   sync.Mutex // guards what follows
	held map[string]heldFD
}

type heldFD struct {
	helper *helper.Helper
	expiry *time.Timer
}

func newFDStore(lifetime time.Duration) *fdStore {
	return &fdStore{lifetime: lifetime, held: map[string]heldFD{}}
}

// put takes over a helper that has a directory. It ends when nobody takes it in time.
func (s *fdStore) put(token string, h *helper.Helper) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case token == "" || len(token) > maxTokenLen:
		return errors.New("malformed token")
	case len(s.held) >= maxTokens:
		return errors.New("too many descriptors are held")
	}
	if _, taken := s.held[token]; taken {
		return errors.New("the token is taken")
	}
	s.held[token] = heldFD{h, time.AfterFunc(s.lifetime, func() { s.drop(token) })}
	return nil
}

// drop ends the helper of a token that nobody has taken.
func (s *fdStore) drop(token string) {
	if unused, err := s.take(token); err == nil {
		unused.End()
	}
}

// take returns the helper of a token, once; the caller ends it.
func (s *fdStore) take(token string) (*helper.Helper, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.held[token]
	if !ok {
		return nil, fmt.Errorf("%w: the engine came to it too late", ErrFreeze)
	}
	delete(s.held, token)
	h.expiry.Stop()
	return h.helper, nil
}

// closeAll forgets every descriptor.
func (s *fdStore) closeAll() {
	s.mu.Lock()
	held := s.held
	s.held = map[string]heldFD{}
	s.mu.Unlock()
	for _, h := range held {
		h.expiry.Stop()
		h.helper.End()
	}
}

// serve receives descriptors until the listener is closed, and waits for the senders.
func (s *fdStore) serve(l *net.UnixListener) {
	var senders sync.WaitGroup
	defer senders.Wait()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				klog.ErrorS(err, "Descriptor socket failed")
			}
			return
		}
		senders.Go(func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(fdCallTimeout))
			reply := []byte{0}
			if err := s.receive(conn); err != nil {
				klog.ErrorS(err, "Descriptor refused")
				reply = append(reply, err.Error()...)
			}
			_, _ = conn.Write(reply)
		})
	}
}

// receive takes one message with one descriptor.
func (s *fdStore) receive(conn *net.UnixConn) error {
	token := make([]byte, maxTokenLen+1)
	control := make([]byte, unix.CmsgSpace(4))
	n, cn, _, _, err := conn.ReadMsgUnix(token, control)
	if err != nil {
		return err
	}
	fds, err := unixsocket.Descriptors(control[:cn])
	if err != nil || len(fds) == 0 {
		return errors.New("no descriptor came with the token")
	}
	unixsocket.CloseAll(fds[1:]) // the padding of the control message has room for one
	dir := os.NewFile(uintptr(fds[0]), "passed directory")
	var st unix.Statx_t
	err = unix.Statx(fds[0], "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		dir.Close()
		return errors.New("the descriptor is not a directory")
	}
	h, err := helper.Start(dir)
	dir.Close() // not the last one: that may have to wait for what is unmounted with it
	if err != nil {
		return err
	}
	if err := s.put(string(token[:n]), h); err != nil {
		h.End()
		return err
	}
	return nil
}

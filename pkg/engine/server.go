package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"path"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// At these verbosities calls are logged: the supervisor's always, the worker's halves of them, and questions
// that change nothing, on demand. Failures are always logged, by the supervisor.
const (
	supervisorLogLevel klog.Level = 0
	workerLogLevel     klog.Level = 4
	quietLogLevel      klog.Level = 4
)

// errPanic is the answer of a call that ran into a mistake of ours.
var errPanic = errors.New("panic")

// newServer makes a gRPC server whose calls are logged and whose errors arrive as the same sentinels.
func newServer(level klog.Level, interceptors ...grpc.UnaryServerInterceptor) *grpc.Server {
	return grpc.NewServer(
		grpc.UnaryInterceptor(logCalls(level)),
		grpc.ChainUnaryInterceptor(interceptors...),
		grpc.WaitForHandlers(true),
		// No keepalive: a peer on this machine is there or its socket is closed, and a supervisor that was
		// stopped for a while must not cost its workers their connection.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: math.MaxInt64}),
	)
}

// logCalls logs each call and is the server's half of the error mapping.
func logCalls(level klog.Level) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		start := time.Now()
		reply, err := handle(ctx, req)
		method := path.Base(info.FullMethod)
		fields := []any{"method", method, "duration", time.Since(start)}
		if r, ok := req.(interface{ GetVolumeId() string }); ok {
			fields = append(fields, "volume", r.GetVolumeId())
		}
		callLevel := level
		if method == "Probe" || method == "List" || method == "ListSnapshots" {
			callLevel = max(level, quietLogLevel)
		}
		if err == nil {
			klog.V(callLevel).InfoS("Call", fields...)
			return reply, nil
		}
		if klog.V(level).Enabled() {
			klog.ErrorS(err, "Call failed", fields...)
		}
		return nil, toStatus(err)
	}
}

// recoverPanic keeps a supervisor alive, since its workers end with it. A worker, whose image may be in any
// state then, ends.
func recoverPanic(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (reply any, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = panicked(path.Base(info.FullMethod), fault)
		}
	}()
	return handle(ctx, req)
}

// explainEnd says of calls that an engine's end has cut short that they can be repeated.
func (s *supervisor) explainEnd(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	reply, err := handle(ctx, req)
	if err != nil && s.running.Err() != nil && !errors.Is(err, errClosing) {
		err = fmt.Errorf("%w: %w", errClosing, err)
	}
	return reply, err
}

// panicked logs a panic that was recovered from, and makes an error of it.
func panicked(method string, fault any) error {
	klog.ErrorS(nil, "Panic", "method", method, "fault", fault, "stack", string(debug.Stack()))
	return fmt.Errorf("%s: %w: %v", method, errPanic, fault)
}

// cutHeader carries, in the header of CreateSnapshot's response, what the snapshot will be.
const cutHeader = "snapshot-bin"

// sendCut tells the caller of CreateSnapshot that the instant of the snapshot has come.
func sendCut(ctx context.Context, s qcow2.Snapshot) {
	b, err := proto.Marshal(snapshotToAPI(s))
	if err == nil {
		err = grpc.SendHeader(ctx, metadata.Pairs(cutHeader, string(b)))
	}
	if err != nil {
		klog.ErrorS(err, "The instant of a snapshot was not announced")
	}
}

// receiveCut is the other end of sendCut; nil if the call failed before.
func receiveCut(header metadata.MD) *api.Snapshot {
	var s api.Snapshot
	if b := header.Get(cutHeader); len(b) != 1 || proto.Unmarshal([]byte(b[0]), &s) != nil {
		return nil
	}
	return &s
}

func snapshotToAPI(s qcow2.Snapshot) *api.Snapshot {
	return &api.Snapshot{Id: s.ID, Name: s.Name, CreationTime: timestamppb.New(s.Date), DiskSize: s.DiskSize}
}

// oneConn is a listener with one connection, that exists already. It ends when the connection does.
type oneConn struct {
	conn  net.Conn
	first sync.Once
	ended chan struct{}
}

func newOneConn(c net.Conn) *oneConn { return &oneConn{conn: c, ended: make(chan struct{})} }

func (l *oneConn) Accept() (c net.Conn, err error) {
	l.first.Do(func() { c = &endingConn{Conn: l.conn, ended: l.ended} })
	if c != nil {
		return c, nil
	}
	<-l.ended
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { return l.conn.Close() }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// endingConn closes ended when it is closed.
type endingConn struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (c *endingConn) Close() error {
	c.once.Do(func() { close(c.ended) })
	return c.Conn.Close()
}

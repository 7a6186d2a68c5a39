// Package rpc is what the two ends of the engine's control API have in common: a server that logs its calls, errors that
// arrive as the sentinels that were sent, and the announcement of a snapshot's instant.
package rpc

import (
	"context"
	"errors"
	"math"
	"path"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"k8s.io/klog/v2"
)

// At these verbosities calls are logged: the supervisor's always, the worker's halves of them, and questions
// that change nothing, on demand. Failures are always logged, by the supervisor.
const (
	SupervisorLogLevel klog.Level = 0
	WorkerLogLevel     klog.Level = 4
	quietLogLevel      klog.Level = 4
)

// MaxMessage bounds a message, in bytes: the list of the 65,536 snapshots that an image can have is longer than the default of
// 4 MiB.
const MaxMessage = 64 << 20

// NewServer makes a gRPC server whose calls are logged and whose errors arrive as the same sentinels.
func NewServer(level klog.Level, interceptors ...grpc.UnaryServerInterceptor) *grpc.Server {
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
		switch {
		case err == nil:
			klog.V(callLevel).InfoS("Call", fields...)
			return reply, nil
		case errors.Is(err, ErrNotAttached): // often what the caller wants to know
			klog.V(callLevel).InfoS("Call of a volume that is not attached", fields...)
		case klog.V(level).Enabled():
			klog.ErrorS(err, "Call failed", fields...)
		}
		return nil, toStatus(err)
	}
}

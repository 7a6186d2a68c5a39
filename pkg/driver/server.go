package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

// shutdownTime is what calls under way get to finish. One that mounts cannot be interrupted; kubelet
// repeats what was cut.
const shutdownTime = 10 * time.Second

// listen makes the socket of an endpoint, for root only. One that nobody listens on any more is replaced.
func listen(ctx context.Context, endpoint string) (*net.UnixListener, error) {
	file, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok || !path.IsAbs(file) {
		return nil, refuse(errInvalid, "endpoint %q is not unix:///path", endpoint)
	}
	listener, err := unixsocket.Listen(ctx, "unix", file)
	if errors.Is(err, unixsocket.ErrTaken) {
		return nil, fmt.Errorf("%w: %w", errExists, err)
	}
	return listener, err
}

// serve runs the server until ctx ends. stop then ends what calls wait for.
func serve(ctx context.Context, server *grpc.Server, listener net.Listener, stop func()) error {
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	stop()
	force := time.AfterFunc(shutdownTime, server.Stop)
	defer force.Stop()
	server.GracefulStop()
	return <-ended
}

// logCalls logs each call when it has ended: what changes something always, the rest only when it fails or
// with -v=4.
func logCalls(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	logger := klog.FromContext(ctx).WithValues("method", method)
	start := time.Now()
	resp, err := handle(klog.NewContext(ctx, logger), req)
	values := []any{"duration", time.Since(start).Round(time.Microsecond), "request", protosanitizer.StripSecrets(req)}
	switch {
	case status.Code(err) == codes.Unimplemented:
		logger.V(4).Info("Call is not implemented", values...)
	case err != nil:
		logger.Error(err, "Call failed", values...)
	case strings.Contains(method, "Get") || strings.HasPrefix(method, "List") || method == "Probe":
		logger.V(4).Info("Call", append(values, "response", protosanitizer.StripSecrets(resp))...)
	default:
		logger.Info("Call", append(values, "response", protosanitizer.StripSecrets(resp))...)
	}
	return resp, err
}

// statusCodes turns the errors of handlers into gRPC's.
func statusCodes(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	resp, err := handle(ctx, req)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// recoverPanics keeps a fault in one call from ending the others.
func recoverPanics(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = panicked(ctx, fault)
		}
	}()
	return handle(ctx, req)
}

// panicked logs where a fault is and returns it as an error.
func panicked(ctx context.Context, fault any) error {
	err := fmt.Errorf("%w: %v", errPanic, fault)
	klog.FromContext(ctx).Error(err, "Panic", "stack", string(debug.Stack()))
	return err
}

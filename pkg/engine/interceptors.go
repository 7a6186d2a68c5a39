package engine

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
)

// errPanic is the answer of a call that ran into a mistake of ours.
var errPanic = errors.New("panic")

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

package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/go-logr/logr/funcr"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestErrorCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{errInvalid, codes.InvalidArgument},
		{pool.ErrNotReady, codes.Unavailable},
		{engine.ErrUnavailable, codes.Unavailable},
		{pool.ErrNotFound, codes.NotFound},
		{pool.ErrBadID, codes.NotFound},
		{qcow2.ErrNotFound, codes.NotFound},
		{engine.ErrTombstone, codes.NotFound},
		{errOtherPool, codes.FailedPrecondition},
		{fmt.Errorf("%w: source %w", errExhausted, errOtherPool), codes.ResourceExhausted},
		{qcow2.ErrNoSpace, codes.ResourceExhausted},
		{errors.Join(qcow2.ErrFailed, qcow2.ErrNoSpace), codes.ResourceExhausted},
		{unix.ENOSPC, codes.ResourceExhausted},
		{pool.ErrInUse, codes.Aborted},
		{errBusy, codes.Aborted},
		{engine.ErrInUse, codes.FailedPrecondition},
		{qcow2.ErrInUse, codes.FailedPrecondition},
		{qcow2.ErrCorrupt, codes.DataLoss},
		{errExists, codes.AlreadyExists},
		{errOutOfRange, codes.OutOfRange},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{errors.New("something else"), codes.Internal},
		{status.Error(codes.Unimplemented, "by gRPC"), codes.Unimplemented},
		{nil, codes.OK},
	} {
		wrapped := c.err
		if wrapped != nil {
			wrapped = fmt.Errorf("volume x: %w", c.err)
		}
		if got := status.Code(toStatus(wrapped)); got != c.code {
			t.Errorf("%v: %v, want %v", c.err, got, c.code)
		}
	}
}

// What is to be done about an image is said where people read it, not by the library.
func TestRepairHint(t *testing.T) {
	for _, err := range []error{qcow2.ErrCorrupt, qcow2.ErrNeedsRepair} {
		want := errors.Is(err, qcow2.ErrNeedsRepair)
		if got := toStatus(fmt.Errorf("open: %w", err)).Error(); strings.Contains(got, "csi-qcow2 image check --repair all") != want {
			t.Errorf("%v is answered with %q", err, got)
		}
	}
}

func TestSecretsAreNotLogged(t *testing.T) {
	var lines []string
	logger := funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{Verbosity: 9})
	ctx := klog.NewContext(t.Context(), logger)
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Controller/CreateVolume"}
	req := &csi.CreateVolumeRequest{Name: "pvc-1", Secrets: map[string]string{"password": "hunter2"}}
	for _, result := range []error{nil, status.Error(codes.Internal, "a fault")} {
		_, _ = logCalls(ctx, req, info, func(context.Context, any) (any, error) { return &csi.CreateVolumeResponse{}, result })
	}
	if len(lines) != 2 {
		t.Errorf("logged %d lines", len(lines))
	}
	for _, line := range lines {
		if !strings.Contains(line, "pvc-1") || strings.Contains(line, "hunter2") {
			t.Errorf("logged: %s", line)
		}
	}
}

func TestPanicIsAnError(t *testing.T) {
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Controller/CreateVolume"}
	_, err := logCalls(t.Context(), nil, info, func(ctx context.Context, req any) (any, error) {
		return statusCodes(ctx, req, info, func(ctx context.Context, req any) (any, error) {
			return recoverPanics(ctx, req, info, func(context.Context, any) (any, error) { panic("a fault") })
		})
	})
	if status.Code(err) != codes.Internal {
		t.Errorf("got %v", err)
	}
}

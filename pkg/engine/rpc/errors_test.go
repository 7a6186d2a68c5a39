package rpc

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Every sentinel survives two hops, worker to supervisor to client, and brings no other with it.
func TestErrorsRoundTrip(t *testing.T) {
	for _, k := range kinds() {
		err := fmt.Errorf("image /x at 0x10: %w", k.sentinel)
		for range 2 {
			sent := toStatus(err)
			if got := status.Code(sent); got != k.code {
				t.Errorf("%s: code %v, want %v", k.reason, got, k.code)
			}
			err = fmt.Errorf("hop: %w", FromStatus(sent))
		}
		for _, other := range kinds() {
			if got, want := errors.Is(err, other.sentinel), other.reason == k.reason; got != want {
				t.Errorf("%s arrived: is it %s? %v, want %v", k.reason, other.reason, got, want)
			}
		}
	}
}

func TestErrorsRoundTripSeveral(t *testing.T) {
	err := FromStatus(toStatus(errors.Join(ErrFreeze, qcow2.ErrNoSpace)))
	wantErr(t, err, ErrFreeze)
	wantErr(t, err, qcow2.ErrNoSpace)
	if got := FromStatus(toStatus(errors.New("odd"))); got == nil || got.Error() != "odd" {
		t.Errorf("arrived as %v", got)
	}
	if toStatus(nil) != nil || FromStatus(nil) != nil {
		t.Error("nil became an error")
	}
}

// Errors of gRPC itself, which carry no details.
func TestErrorsOfTransport(t *testing.T) {
	for code, want := range map[codes.Code]error{
		codes.Unavailable:      ErrUnavailable,
		codes.Canceled:         context.Canceled,
		codes.DeadlineExceeded: context.DeadlineExceeded,
	} {
		err := FromStatus(status.Error(code, "x"))
		wantErr(t, err, want)
		var remote *remoteError
		if !errors.As(err, &remote) || len(remote.sentinels) != 1 {
			t.Errorf("%v arrived as %#v", code, err)
		}
	}
}

func TestErrorReasonsAreUnique(t *testing.T) {
	reasons := map[string]bool{}
	for _, k := range kinds() {
		if reasons[k.reason] {
			t.Errorf("%s is there twice", k.reason)
		}
		reasons[k.reason] = true
	}
}

// wantErr fails unless err matches the sentinel.
func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

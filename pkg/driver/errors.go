package driver

import (
	"context"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/refusal"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// What a handler may answer besides the errors of the packages below: one for each condition that the
// CSI specification gives a code.
var (
	errInvalid      = errors.New("invalid argument")
	errNotFound     = errors.New("not found")
	errExists       = errors.New("already exists and is not compatible")
	errExhausted    = errors.New("resource exhausted")
	errOutOfRange   = errors.New("capacity range cannot be met")
	errPrecondition = errors.New("failed precondition")
	errToken        = errors.New("starting_token is not from this listing; start again without")
	errBusy         = errors.New("another operation is in progress")
	errOtherPool    = errors.New("belongs to the pool of another node")
	errPanic        = errors.New("internal error")
)

// errorCode is one row of the only table from errors to gRPC codes.
type errorCode struct {
	code   codes.Code
	errors []error
}

// errorCodes is in order of precedence: where an error wraps several, the first row that holds one of them
// decides. What is in no row is INTERNAL.
func errorCodes() []errorCode {
	return []errorCode{
		{codes.Internal, []error{errPanic, engine.ErrLost}},
		{codes.InvalidArgument, []error{errInvalid, engine.ErrInvalid}},
		{codes.ResourceExhausted, []error{errExhausted, qcow2.ErrNoSpace, qcow2.ErrLimit, unix.ENOSPC, unix.EDQUOT}},
		{codes.OutOfRange, []error{errOutOfRange}},
		{codes.AlreadyExists, []error{errExists, qcow2.ErrExists}},
		{codes.Unavailable, []error{pool.ErrNotReady, engine.ErrUnavailable, qcow2.ErrClosed}},
		{codes.FailedPrecondition, []error{
			errPrecondition, errOtherPool, engine.ErrInUse, engine.ErrNotAttached, qcow2.ErrUnsupported,
		}},
		{codes.NotFound, []error{errNotFound, engine.ErrTombstone, pool.ErrNotFound, pool.ErrBadID, qcow2.ErrNotFound}},
		// pool.ErrExists: another plugin made the volume meanwhile; the repeated call finds it.
		{codes.Aborted, []error{errBusy, errToken, pool.ErrInUse, pool.ErrExists, engine.ErrFreeze}},
		{codes.FailedPrecondition, []error{qcow2.ErrInUse}},
		{codes.DataLoss, []error{qcow2.ErrCorrupt, qcow2.ErrFailed, unix.EIO}},
		{codes.DeadlineExceeded, []error{context.DeadlineExceeded}},
		{codes.Canceled, []error{context.Canceled}},
	}
}

// toStatus turns what a handler returns into what gRPC sends.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err // made by gRPC: UNIMPLEMENTED
	}
	text := inPlainWords(err.Error())
	if errors.Is(err, qcow2.ErrNeedsRepair) {
		text += "; " + RepairHint
	}
	return status.Error(codeOf(err), text)
}

// RepairHint says what to do about qcow2.ErrNeedsRepair, for people.
const RepairHint = "`csi-qcow2 image check --repair all` tells what is wrong, and mends it"

// inPlainWords replaces what Go says of a call that ended before its work, which is asked for again, and of several errors.
func inPlainWords(text string) string {
	return strings.NewReplacer(
		context.DeadlineExceeded.Error(), "not finished in time",
		context.Canceled.Error(), "given up before it was finished",
		"\n", "; ",
	).Replace(text)
}

func codeOf(err error) codes.Code {
	for _, row := range errorCodes() {
		if slices.ContainsFunc(row.errors, func(e error) bool { return errors.Is(err, e) }) {
			return row.code
		}
	}
	return codes.Internal
}

// refuse takes a format and what goes into it, as fmt.Errorf does. The code says the kind.
func refuse(kind error, format string, args ...any) error {
	return refusal.Errorf(kind, format, args...)
}

// invalid is an INVALID_ARGUMENT that says what is wrong.
func invalid(format string, args ...any) error {
	return refuse(errInvalid, format, args...)
}

// required is an INVALID_ARGUMENT if a required field of a request is empty.
func required(name, value string) error {
	if value == "" {
		return invalid("%s is missing", name)
	}
	return nil
}

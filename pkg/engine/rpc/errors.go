package rpc

import (
	"context"
	"errors"
	"regexp"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/refusal"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Errors that callers of an engine's client match with errors.Is. The sentinel errors of pkg/pool and
// pkg/qcow2 arrive as themselves too: an unknown volume is pool.ErrNotFound, an unknown snapshot
// qcow2.ErrNotFound, a full disk qcow2.ErrNoSpace.
var (
	// ErrNotAttached is returned for an operation on a volume that no worker serves: the caller may
	// open the image itself, under the pool's lock.
	ErrNotAttached = errors.New("volume is not attached")
	// ErrInUse is returned by Detach while something has the device open. Nothing was changed.
	ErrInUse = errors.New("device is in use")
	// ErrTombstone is returned by Attach for a volume that was deleted and only keeps its snapshots.
	ErrTombstone = errors.New("volume is deleted, only its snapshots remain")
	// ErrUnavailable is returned when the engine, its pool or the volume's worker cannot be reached,
	// or went away during the call: try again.
	ErrUnavailable = errors.New("engine is unavailable")
	// ErrInvalid is returned for a request that can never succeed: a reserved snapshot name, a target
	// outside the pool.
	ErrInvalid = errors.New("invalid request")
	// ErrFreeze is returned by CreateSnapshot when the file system could not be frozen, or not be
	// kept frozen until the snapshot. No snapshot was made.
	ErrFreeze = errors.New("file system was not frozen")
	// ErrLost is returned for a snapshot that was answered with as pending and never came to be. Its name is
	// free again when it has been deleted.
	ErrLost = errors.New("snapshot is lost")
)

// Refuse takes a format and what goes into it, as fmt.Errorf does, and makes an error of a kind of it, whose text is all that a
// claim, a pod or a snapshot shows.
func Refuse(kind error, format string, args ...any) error {
	return refusal.Errorf(kind, format, args...)
}

// errorDomain marks the error details that this package writes.
const errorDomain = "engine.qcow2.csi.dev"

// kind is how one sentinel error travels: as a reason in the status details, and as a code for whoever
// reads no details.
type kind struct {
	reason   string
	sentinel error
	code     codes.Code
	byGRPC   bool // gRPC itself makes errors of this code, without a reason, that mean the same
}

// kinds is the one table of errors that survive a call. Where several match, the first gives the code.
func kinds() []kind {
	return []kind{
		{"NOT_ATTACHED", ErrNotAttached, codes.FailedPrecondition, false},
		{"DEVICE_IN_USE", ErrInUse, codes.FailedPrecondition, false},
		{"TOMBSTONE", ErrTombstone, codes.FailedPrecondition, false},
		{"INVALID", ErrInvalid, codes.InvalidArgument, false},
		{"FREEZE", ErrFreeze, codes.Aborted, false},
		{"SNAPSHOT_LOST", ErrLost, codes.Internal, false},
		{"UNAVAILABLE", ErrUnavailable, codes.Unavailable, true},

		{"POOL_NOT_READY", pool.ErrNotReady, codes.Unavailable, false},
		{"VOLUME_NOT_FOUND", pool.ErrNotFound, codes.NotFound, false},
		{"VOLUME_IN_USE", pool.ErrInUse, codes.FailedPrecondition, false},
		{"BAD_VOLUME_ID", pool.ErrBadID, codes.InvalidArgument, false},

		{"NO_SPACE", qcow2.ErrNoSpace, codes.ResourceExhausted, false},
		{"NOT_FOUND", qcow2.ErrNotFound, codes.NotFound, false},
		{"EXISTS", qcow2.ErrExists, codes.AlreadyExists, false},
		{"IN_USE", qcow2.ErrInUse, codes.FailedPrecondition, false},
		{"CORRUPT", qcow2.ErrCorrupt, codes.DataLoss, false},
		{"NEEDS_REPAIR", qcow2.ErrNeedsRepair, codes.DataLoss, false},
		{"UNSUPPORTED", qcow2.ErrUnsupported, codes.Unimplemented, false},
		{"LIMIT", qcow2.ErrLimit, codes.ResourceExhausted, false},
		{"READ_ONLY", qcow2.ErrReadOnly, codes.FailedPrecondition, false},
		{"OUT_OF_RANGE", qcow2.ErrOutOfRange, codes.OutOfRange, false},
		{"IMAGE_FAILED", qcow2.ErrFailed, codes.DataLoss, false},
		{"CLOSED", qcow2.ErrClosed, codes.Unavailable, false},

		{"CANCELED", context.Canceled, codes.Canceled, true},
		{"DEADLINE_EXCEEDED", context.DeadlineExceeded, codes.DeadlineExceeded, true},
	}
}

// toStatus turns an error into what gRPC sends: the code of its first kind, the text, and a reason for
// each sentinel that it wraps.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	out := status.New(code, err.Error())
	for _, k := range kinds() {
		if !errors.Is(err, k.sentinel) {
			continue
		}
		if code == codes.Unknown {
			code = k.code
			out = status.New(code, err.Error())
		}
		detailed, detailErr := out.WithDetails(&errdetails.ErrorInfo{Domain: errorDomain, Reason: k.reason})
		if detailErr == nil {
			out = detailed
		}
	}
	return out.Err()
}

// FromStatus is the reverse of toStatus: the error it returns has the text, and wraps the sentinels, of
// the error on the other side. A connection that failed is ErrUnavailable, a context that ended its error.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	remote := &remoteError{text: st.Message()}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			remote.add(func(k kind) bool { return k.reason == info.GetReason() })
		}
	}
	if len(remote.sentinels) > 0 {
		return remote
	}
	remote.add(func(k kind) bool { return k.byGRPC && k.code == st.Code() })
	remote.text = plain(st)
	return remote
}

// dialed is what gRPC says of a socket that cannot be reached.
var dialed = regexp.MustCompile(`dial unix (\S+): (?:connect: )?([^"]*)`)

// plain says what happened to a call, or to its connection, to people who know neither Go nor gRPC.
func plain(st *status.Status) string {
	switch text := st.Message(); st.Code() {
	case codes.Unavailable:
		if socket := dialed.FindStringSubmatch(text); socket != nil {
			return socket[1] + " does not answer: " + socket[2]
		}
		if strings.Contains(text, "transport") || strings.Contains(text, "EOF") {
			return "the connection ended before there was an answer"
		}
		return text
	case codes.DeadlineExceeded:
		return "not finished in time"
	case codes.Canceled:
		return "given up before it was finished"
	default:
		return text
	}
}

// remoteError is an error from the other end of a connection.
type remoteError struct {
	text      string
	sentinels []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.sentinels }

func (e *remoteError) add(match func(kind) bool) {
	for _, k := range kinds() {
		if match(k) {
			e.sentinels = append(e.sentinels, k.sentinel)
		}
	}
}

// DecodeErrors is the client's half of the error mapping.
func DecodeErrors(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	return FromStatus(invoke(ctx, method, req, reply, cc, opts...))
}

package engine

import "github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"

// Errors that callers of a Client match with errors.Is, as they travel over the control API: package rpc says when each is
// returned. The sentinel errors of pkg/pool and pkg/qcow2 arrive as themselves too.
var (
	ErrNotAttached = rpc.ErrNotAttached
	ErrInUse       = rpc.ErrInUse
	ErrTombstone   = rpc.ErrTombstone
	ErrUnavailable = rpc.ErrUnavailable
	ErrInvalid     = rpc.ErrInvalid
	ErrFreeze      = rpc.ErrFreeze
	ErrLost        = rpc.ErrLost
)

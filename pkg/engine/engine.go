// Package engine serves attached volumes. A supervisor listens on a unix socket and starts one worker
// process for each attached volume; the worker owns the image and serves the block device. What a device consists of is
// kept by a holder, a process of its own: when a worker dies another goes on, and when the engine ends the next one does;
// the users of the volumes wait meanwhile.
//
//	plugin ──gRPC, unix socket──▶ supervisor ──gRPC, socketpair──▶ worker ──▶ image.qcow2, /dev/loopN
//	                                                                 └─unix socket──▶ holder
package engine

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
)

// IsReservedSnapshot tells whether a snapshot name is one that the engine uses for clones.
// Nobody may create one, and listings hide them.
func IsReservedSnapshot(name string) bool { return worker.IsReservedSnapshot(name) }

// Options of an engine.
type Options struct {
	// Listen is the endpoint of the control API, unix:///path. A second socket, for file descriptors, is
	// made at path.fds.
	Listen string
	// PoolDir is the pool whose volumes are served. It may become a pool later.
	PoolDir string
	// NodeID is the name of the node that the pool must belong to; empty: any node's is served, but no copy.
	NodeID string
	// Version is what Probe answers.
	Version string
	// Holder is the path of a running holder's socket. When the engine ends it leaves the volumes to the next one then, for
	// which it waits when it starts. Empty: the engine is its own holder, and detaches or aborts the volumes.
	Holder string
	// IOTimeout is how long users of a volume wait for a worker that does not start before they get errors; 0: a minute.
	IOTimeout time.Duration
	// Journal makes workers keep unanswered requests as on a kernel that cannot hand them out again; for tests.
	Journal bool
	// Ready, if not nil, is called when the engine serves, or stands by to take over from another one.
	Ready func()
	// WorkerCommand is the command of a worker process, to which "--pool DIR --volume ID --holder PATH [--journal]" is added; it
	// must call worker.Run. Empty: this executable with the argument "worker".
	WorkerCommand []string
	// Metrics, if not nil, gets the engine's metrics.
	Metrics prometheus.Registerer

	hooks hooks
}

// hooks let tests stop the supervisor at places where it can be killed, and be less patient.
type hooks struct {
	frozen         func()        // after FIFREEZE
	orphanPatience time.Duration // if not 0
	maxFreezing    time.Duration // if not 0
	maxFrozen      time.Duration // if not 0
	answerAfter    time.Duration // if not 0
}

func (o Options) ready() {
	if o.Ready != nil {
		o.Ready()
	}
}

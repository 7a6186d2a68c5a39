package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// errOtherEngine is why an engine does not start.
var errOtherEngine = errors.New("another engine is running")

// holderSocketSuffix is added to the path of an engine's socket for the holder that is part of it.
const holderSocketSuffix = ".holder"

// poolPoll is how often an engine without a pool looks for it.
const poolPoll = time.Second

// Run serves a pool until ctx ends; what becomes of the volumes then, see Options.Holder. It returns an
// error if another engine listens on the same socket, or serves the same pool and cannot be waited for. A pool that is not there yet
// is waited for: every call answers ErrUnavailable until it appears.
func Run(ctx context.Context, o Options) error {
	path, err := socketPath(o.Listen)
	if err != nil {
		return err
	}
	if len(o.WorkerCommand) == 0 {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("own executable, for workers: %w", err)
		}
		o.WorkerCommand = []string{self, "worker"}
	}
	ownHolder := o.Holder == ""
	if ownHolder {
		o.Holder = path + holderSocketSuffix
	}
	o.IOTimeout = cmp.Or(o.IOTimeout, defaultIOTimeout)
	s := newSupervisor(ctx, o)
	s.ownHolder = ownHolder
	defer s.shutDown(context.WithoutCancel(ctx))
	if err := s.open(ctx); err != nil && !errors.Is(err, pool.ErrNotReady) {
		return err
	}
	return s.serve(ctx, path)
}

// serve answers calls until ctx ends, and shuts down.
func (s *supervisor) serve(parent context.Context, path string) error {
	calls, err := listen(parent, "unix", path)
	if err != nil {
		return err
	}
	defer calls.Close()
	fds, err := listen(parent, "unixpacket", path+fdSocketSuffix)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(parent)
	defer stop(nil)
	server := rpc.NewServer(rpc.SupervisorLogLevel, recoverPanic, s.explainEnd)
	calling := &service{supervisor: s}
	api.RegisterEngineServer(server, calling)
	if s.options.Metrics != nil {
		if err := calling.register(ctx, s.options.Metrics); err != nil {
			return err
		}
	}
	var helpers sync.WaitGroup
	holding, endHolder := context.WithCancel(context.WithoutCancel(parent))
	defer helpers.Wait()
	defer endHolder()
	if s.ownHolder {
		helpers.Go(func() {
			if err := holder.Run(holding, holder.Options{Socket: s.options.Holder, Ephemeral: true}); err != nil {
				stop(fmt.Errorf("holder: %w", err))
			}
		})
	}
	helpers.Go(func() { s.holder.Guard(s.running) })
	helpers.Go(func() { s.fds.serve(fds) })
	helpers.Go(func() { stop(s.awaitPool(ctx)) })
	helpers.Go(func() { stop(server.Serve(calls)) })
	klog.InfoS("Engine is listening", "socket", path)

	<-ctx.Done()
	klog.InfoS("Engine is stopping", "reason", context.Cause(ctx))
	calls.Close()
	fds.Close()
	helpers.Go(server.Stop) // at once: clients find the next engine then
	s.shutDown(context.WithoutCancel(ctx))
	if parent.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// awaitPool opens the pool as soon as it is there, also when it was lost. It returns when ctx ends or the pool cannot be
// served.
func (s *supervisor) awaitPool(ctx context.Context) error {
	tick := time.NewTicker(poolPoll)
	defer tick.Stop()
	for told := ""; ; {
		err := s.open(ctx)
		if err == nil {
			s.options.ready()
			if s.awaitLoss(ctx) != nil {
				return nil // ctx has ended
			}
			continue
		}
		if !errors.Is(err, pool.ErrNotReady) {
			return err
		}
		if errors.Is(err, pool.ErrForeign) && err.Error() != told { // somebody has to do something
			told = err.Error()
			klog.ErrorS(err, "The pool is refused")
		}
		klog.V(2).InfoS("Waiting for the pool", "reason", err)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// listen makes one of the engine's sockets. errOtherEngine if another engine has it.
func listen(ctx context.Context, network, path string) (*net.UnixListener, error) {
	l, err := unixsocket.Listen(ctx, network, path)
	if errors.Is(err, unixsocket.ErrTaken) {
		err = fmt.Errorf("%w: %w", errOtherEngine, err)
	}
	return l, err
}

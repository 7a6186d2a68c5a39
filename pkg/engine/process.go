package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/confined"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

const (
	// stopPatience is how long a worker may take to flush and exit before it is killed.
	stopPatience = time.Minute
	// leavePatience is the same for one whose device is left to a next worker, which must not be kept waiting until the users
	// of the volume get errors: what a killed one has not done the next one does.
	leavePatience = 10 * time.Second
	// killPatience is how long a killed process may take to end. One that waits for a disk may take for ever.
	killPatience = 5 * time.Second
)

// process is the supervisor's end of one worker process.
type process struct {
	volume string
	cmd    *exec.Cmd
	conn   *grpc.ClientConn
	api    api.EngineClient
	done   chan struct{} // closed when the process has been reaped
	exit   error         // how it ended; read after done

	leaving atomic.Bool // it was told to end
	asked   asked
}

// startProcess starts a worker for one volume. The caller stops it.
func startProcess(command []string, o worker.Options) (*process, error) {
	volume := o.Volume
	ours, theirs, err := unixsocket.Pair(unix.SOCK_STREAM)
	if err != nil {
		return nil, fmt.Errorf("socket pair for the worker of %s: %w", volume, err)
	}
	defer theirs.Close()
	args := slices.Concat(command[1:], []string{"--pool", o.PoolDir, "--volume", volume, "--holder", o.Holder})
	if o.Journal {
		args = append(args, "--journal")
	}
	cmd := exec.Command(command[0], args...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs} // worker.ControlFD
	// The last of two settings counts. Each thread that serves the device needs a processor of the Go runtime's when its
	// request arrives; with as few as there are cores it waits for one: half of the speed.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=16")
	// A group of its own: a terminal's interrupt is for the supervisor alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	conn, err := workerConn(ours)
	if err != nil {
		ours.Close()
		return nil, err
	}
	if err := confined.Start(cmd); err != nil {
		conn.Close()
		ours.Close()
		return nil, fmt.Errorf("start the worker of %s: %w", volume, err)
	}
	p := &process{volume: volume, cmd: cmd, conn: conn, api: api.NewEngineClient(conn), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.exit = cmd.Wait()
		conn.Close()
		ours.Close()
	}()
	return p, nil
}

// workerConn makes a gRPC connection of a socket that is connected already. It cannot be made twice, and
// must never be given up for idleness: a worker that loses it takes its supervisor for dead.
func workerConn(c net.Conn) (*grpc.ClientConn, error) {
	once := make(chan net.Conn, 1)
	once <- c
	conn, err := grpc.NewClient("passthrough:///worker",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the worker's connection has ended")
			}
		}),
		grpc.WithIdleTimeout(0),
		grpc.WithUnaryInterceptor(rpc.DecodeErrors),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(rpc.MaxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("worker connection: %w", err)
	}
	return conn, nil
}

// createSnapshot is the call of that name; cut is called once at the instant whose state the snapshot holds, with what
// it will be, or with nil when there will be none because the call failed or the worker died. The worker tells the
// instant by sending the response's header then, long before the response.
func (p *process) createSnapshot(ctx context.Context, name string, cut func(*api.Snapshot)) (*api.Snapshot, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var reply api.CreateSnapshotResponse
	err := func() error {
		var header metadata.MD
		announce := sync.OnceFunc(func() { cut(rpc.ReceiveCut(header)) })
		defer announce()
		stream, err := p.conn.NewStream(ctx, &grpc.StreamDesc{}, api.Engine_CreateSnapshot_FullMethodName)
		if err != nil {
			return err
		}
		if err := stream.SendMsg(&api.CreateSnapshotRequest{VolumeId: p.volume, Name: name}); err != nil {
			return stream.RecvMsg(&reply) // says why
		}
		if err := stream.CloseSend(); err != nil {
			return err
		}
		header, err = stream.Header()
		announce()
		if err != nil {
			return err
		}
		return stream.RecvMsg(&reply)
	}()
	if err != nil {
		return nil, rpc.FromStatus(err)
	}
	return reply.GetSnapshot(), nil
}

// stop lets the worker flush, leave what it still serves, and exit. It returns when the worker is gone, or has been killed and
// does not go.
func (p *process) stop() { p.stopWithin(stopPatience) }

func (p *process) stopWithin(patience time.Duration) {
	p.leaving.Store(true)
	p.conn.Close()
	if p.gone(patience) {
		return
	}
	klog.ErrorS(nil, "Worker does not end, killing it", "volume", p.volume, "pid", p.cmd.Process.Pid)
	_ = p.cmd.Process.Kill()
	if !p.gone(killPatience) {
		klog.ErrorS(nil, "Worker was killed and does not end: it waits for the pool's disk", "volume", p.volume, "pid", p.cmd.Process.Pid)
	}
}

// gone waits for the worker to end, and tells whether it has.
func (p *process) gone(patience time.Duration) bool {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-p.done:
		return true
	case <-timeout.C:
		return false
	}
}

// snapshot returns the snapshot of a name, nil if there is none.
func (p *process) snapshot(ctx context.Context, name string) (*api.Snapshot, error) {
	r, err := p.api.ListSnapshots(ctx, &api.ListSnapshotsRequest{VolumeId: p.volume})
	if err != nil {
		return nil, err
	}
	for _, s := range r.GetSnapshots() {
		if s.GetName() == name {
			return s, nil
		}
	}
	return nil, nil //nolint:nilnil // no such snapshot is not an error
}

// explain adds to a call's error how the worker ended, if it did.
func (p *process) explain(err error) error {
	// Which of the two it is depends on whether the connection broke during the call or before.
	if !errors.Is(err, ErrUnavailable) && !errors.Is(err, context.Canceled) {
		return err
	}
	// The connection may break a moment before the process is reaped, and while it closes its image.
	patience := time.Second
	leaving := p.leaving.Load()
	if leaving {
		patience = statusPatience
	}
	switch {
	case p.gone(patience):
		return fmt.Errorf("%w: %w", p.death(), err)
	case leaving:
		return rpc.Refuse(ErrUnavailable, "it is being detached: %w", err)
	default:
		return err
	}
}

// death says how the process ended, or nil while it runs.
func (p *process) death() error {
	select {
	case <-p.done:
		if p.exit == nil {
			return rpc.Refuse(ErrUnavailable, "its worker has ended")
		}
		return rpc.Refuse(ErrUnavailable, "its worker has died (%s)", strings.TrimPrefix(p.exit.Error(), "signal: "))
	default:
		return nil
	}
}

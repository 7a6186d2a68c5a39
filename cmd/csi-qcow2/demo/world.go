package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	readyTime = 20 * time.Second // that engine and plugin may take to answer
	readyPoll = 20 * time.Millisecond
)

// world is the temporary pool with what runs on it. All that it makes is in dir, or bears its mark.
type world struct {
	program string
	dir     string
	pool    *pool.Pool

	processes []*process // in the order of their start
	conn      *grpc.ClientConn

	controller csi.ControllerClient
	node       csi.NodeClient

	volumes   []*volume
	snapshots []string // IDs
}

func newWorld(o Options) (*world, error) {
	var disk unix.Statfs_t
	if err := unix.Statfs(o.Dir, &disk); err != nil {
		return nil, fmt.Errorf("%s: %w", o.Dir, err)
	}
	if disk.Type == unix.TMPFS_MAGIC {
		return nil, fmt.Errorf("%s is in memory: choose a directory on a disk with --dir", o.Dir)
	}
	dir, err := os.MkdirTemp(o.Dir, "csi-qcow2-demo-")
	if err != nil {
		return nil, err
	}
	return &world{program: o.Program, dir: dir}, nil
}

// path returns a path in the world's directory.
func (w *world) path(elements ...string) string {
	return filepath.Join(append([]string{w.dir}, elements...)...)
}

func (w *world) endpoint(name string) string { return "unix://" + w.path(name+".sock") }
func (w *world) mark() string                { return "CSI_QCOW2_DEMO=" + w.dir }

// start makes the pool, starts the engine and the plugin and waits until they are ready.
func (w *world) start(ctx context.Context) (err error) {
	dir := w.path("pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if _, err := w.run(ctx, "pool", "init", dir); err != nil {
		return err
	}
	if w.pool, err = pool.Open(dir); err != nil {
		return err
	}
	err = w.spawn("engine", "--listen", w.endpoint("engine"), "--pool", dir)
	if err != nil {
		return err
	}
	err = w.spawn("node", "--endpoint", w.endpoint("csi"), "--node-id", "demo", "--pool", dir,
		"--engine", w.endpoint("engine"), "--reserve", "0")
	if err != nil {
		return err
	}
	w.conn, err = grpc.NewClient(w.endpoint("csi"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	w.controller, w.node = csi.NewControllerClient(w.conn), csi.NewNodeClient(w.conn)
	return w.awaitReady(ctx)
}

func (w *world) spawn(args ...string) error {
	p, err := startProcess(w.dir, w.mark(), w.program, args...)
	if err != nil {
		return err
	}
	w.processes = append(w.processes, p)
	return nil
}

// awaitReady waits until nothing is wrong with pool and engine.
func (w *world) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		health, err := w.node.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
		if err == nil && len(health.GetBackendHealth()) == 0 {
			return nil
		}
		for _, p := range w.processes {
			select {
			case <-p.done:
				return fmt.Errorf("the %s ended: %w", p.name, orSuccess(p.exit))
			default:
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("engine and plugin are not ready: %w %v", errors.Join(ctx.Err(), err), health.GetBackendHealth())
		case <-tick.C:
		}
	}
}

// environment tells the commands of this program where they are.
func (w *world) environment() []string {
	return []string{"CSI_QCOW2_POOL=" + w.pool.Dir(), "CSI_QCOW2_ENGINE=" + w.endpoint("engine"), "CSI_QCOW2_PLUGIN=" + w.endpoint("csi")}
}

// shell runs a command of a user, this program's or another's, in the pool's directory, and returns its output.
func (w *world) shell(ctx context.Context, words ...string) (string, error) {
	program := words[0]
	if program == "csi-qcow2" {
		program = w.program
	}
	cmd := exec.CommandContext(ctx, program, words[1:]...)
	cmd.Dir, cmd.Env = w.pool.Dir(), append(os.Environ(), w.environment()...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(words, " "), err, out)
	}
	return string(out), nil
}

// run runs this program to its end and returns its output.
func (w *world) run(ctx context.Context, args ...string) (string, error) {
	return output(ctx, w.program, args...)
}

func output(ctx context.Context, program string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// logs returns the end of what engine and plugin said.
func (w *world) logs() string {
	var b strings.Builder
	for _, p := range w.processes {
		fmt.Fprintf(&b, "\nThe last lines of the %s:\n%s\n", p.name, p.tail(15))
	}
	return b.String()
}

// deleteAll deletes all snapshots and volumes over CSI.
func (w *world) deleteAll(ctx context.Context) (string, error) {
	for _, id := range w.snapshots {
		if _, err := w.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
			return "", err
		}
	}
	for _, v := range w.volumes {
		if err := v.delete(ctx); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d snapshots, %d volumes", len(w.snapshots), len(w.volumes)), nil
}

// checkEmpty fails if the pool still holds a volume.
func (w *world) checkEmpty() error {
	volumes, err := w.pool.Volumes()
	if err == nil && len(volumes) > 0 {
		err = fmt.Errorf("there is still %s, and %d in all", volumes[0].ID, len(volumes))
	}
	return err
}

// close takes everything down: the volumes are unmounted, by force if the plugin does not do it, the
// processes stopped, the directory removed. It fails if anything is left.
func (w *world) close(ctx context.Context) error {
	var failures []error
	for _, v := range w.volumes {
		if err := v.unmount(ctx); err != nil {
			failures = append(failures, err)
		}
	}
	failures = append(failures, unmountBelow(w.dir))
	for i := len(w.processes) - 1; i >= 0; i-- {
		failures = append(failures, w.processes[i].stop(ctx))
	}
	if w.conn != nil {
		failures = append(failures, w.conn.Close())
	}
	failures = append(failures, w.leftovers(ctx))
	return errors.Join(append(failures, os.RemoveAll(w.dir))...)
}

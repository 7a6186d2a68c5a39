package driver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/thread"
)

// fuseDirs is a FUSE server of a file system that is a directory of directories, until it stalls.
type fuseDirs struct {
	fd    int
	stall atomic.Bool
}

// serve answers nothing any more once it is to stall; the kernel then has whoever asked until the process ends.
func (f *fuseDirs) serve() {
	le := binary.LittleEndian
	request := make([]byte, 256<<10)
	for {
		n, err := unix.Read(f.fd, request)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		if f.stall.Load() {
			continue
		}
		opcode, unique, node := le.Uint32(request[4:]), le.Uint64(request[8:]), le.Uint64(request[16:])
		attributes := make([]byte, 88)
		le.PutUint32(attributes[60:], unix.S_IFDIR|0o755)
		le.PutUint32(attributes[64:], 2)
		var body []byte
		errno := int32(0)
		switch opcode {
		case 1: // LOOKUP: nothing is valid for longer than the answer takes
			body = append(le.AppendUint64(nil, unique+1), make([]byte, 32)...)
			body = append(body, attributes...)
			le.PutUint64(body[40:], unique+1)
		case 2, 42: // FORGET, BATCH_FORGET
			continue
		case 3: // GETATTR
			body = append(make([]byte, 16), attributes...)
			le.PutUint64(body[16:], node)
		case 26: // INIT
			body = make([]byte, 64)
			le.PutUint32(body, 7)
			le.PutUint32(body[4:], 31)
			le.PutUint32(body[20:], 4096)
		default:
			errno = -int32(unix.ENOSYS)
		}
		answer := le.AppendUint32(nil, uint32(16+len(body)))
		answer = le.AppendUint32(answer, uint32(errno))
		answer = append(le.AppendUint64(answer, unique), body...)
		_, _ = unix.Write(f.fd, answer)
	}
}

// runStalled serves such mounts until it is told to end, and says when they are there.
func runStalled(ctx context.Context, args []string) error {
	if err := errors.Join(forgetDisks(), mountStalled(args[0])); err != nil {
		return err
	}
	fmt.Println("mounted")
	<-ctx.Done()
	return nil
}

// mountStalled mounts, below dir and in this process's mount namespace, what a pod may have mounted: a file system with the
// name of a directory as its source, and directories of it that are named as devices are. From then on nobody who looks at
// one of them comes back.
func mountStalled(dir string) error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := &fuseDirs{fd: fd}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	fuse := filepath.Join(dir, "x")
	if err := unix.Mount(fuse, fuse, "fuse", 0, options); err != nil {
		return os.NewSyscallError("mount", err)
	}
	go f.serve() // there is nothing to read before
	for n := range 64 {
		name := fmt.Sprintf("loop%d", n)
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			return err
		}
		if err := unix.Mount(filepath.Join(fuse, name), filepath.Join(dir, name), "", unix.MS_BIND, ""); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	f.stall.Store(true)
	return nil
}

// TestStalledMount: a pod's file system whose server does not answer holds up nobody else's volume. The mounts are the
// plugin's own, for the other programs of the machine's sake.
func TestStalledMount(t *testing.T) {
	r := newIdleRig(t)
	initPool(t, r.dir)
	r.startEngine()
	pods := filepath.Join(r.base, "pods")
	must(t, os.MkdirAll(filepath.Join(pods, "x"), 0o700))
	pod, told := newProcess(t, "stalled", pods), make([]byte, 7)
	said, err := pod.cmd.StdoutPipe()
	must(t, err)
	pod.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	pod.start(pod.cmd.Start)
	if _, err := io.ReadFull(said, told); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pod.cmd.Process.Pid))
	must(t, err)
	defer file.Close()
	ns := &namespace{file}
	plugin := newProcess(t, "plugin", "--endpoint", r.endpoint("csi.sock"), "--pool", r.dir, "--engine", r.endpoint("engine.sock"))
	plugin.start(func() error { return ns.start("", plugin.cmd.Start) })
	t.Cleanup(func() { pod.kill(); plugin.kill() }) // in this order: whoever waits for the pod's server then gets an error
	r.dial("csi.sock")

	disk := r.create("disk", 16*mib, blockCapability(writer))
	disk.publish("vm")
	for _, fsType := range []string{fsXFS, fsExt4} {
		v := r.create("fs-"+fsType, 1, mountCapability(fsType))
		v.publish("pod")
		v.unstage("pod")
		v.publish("pod")
		if fsType == fsXFS { // ext4 grows online only with CAP_SYS_RESOURCE
			v.expand(v.target("pod"), v.size+64*mib)
		}
		must(t, ns.start("", func() error { return bindMount(filepath.Join(pods, "loop1"), v.target("pod"), false) })) // over it
		snap := v.snapshot("snap")
		_, err := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target("pod")})
		wantCode(t, codes.NotFound)(nil, err)
		v.unpublishUnseen("pod")
		v.unstage()
		v.delete()
		r.deleteSnapshots(snap)
	}
	disk.expand(disk.target("vm"), 32*mib)
	disk.unstage("vm")
	disk.delete()
	plugin.terminate()
}

// TestProgramLimit: a program that does not end is killed, and the next one runs.
func TestProgramLimit(t *testing.T) {
	ns, err := newNamespace()
	must(t, err)
	defer ns.Close()
	p := &programs{ns: ns, running: map[string]string{}, patience: 300 * time.Millisecond}
	endless := program{device: "/dev/null", limit: thorough, command: []string{"sh", "-c", "trap '' TERM; sleep 1000 & wait; sleep 1000"}}
	if _, err := p.run(endless); !errors.Is(err, context.DeadlineExceeded) || codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	computing := program{device: "/dev/null", limit: 2 * time.Second, command: []string{"sh", "-c", "while :; do :; done"}}
	start := time.Now()
	if _, err := p.run(computing); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) < computing.limit {
		t.Errorf("one that computes: %v", err)
	}
	o, err := p.run(program{device: "/dev/null", limit: thorough, command: []string{"cat", "/proc/self/mounts"}})
	if err != nil || o.status != 0 {
		t.Fatalf("%v, %+v", err, o)
	}
	t.Logf("what programs see:\n%s", o.output)
	must(t, p.begin("/dev/null", "mkfs of an earlier call"))
	if _, err := p.run(endless); codeOf(err) != codes.Aborted {
		t.Errorf("beside another one: %v", err)
	}
}

// unpublishUnseen is unpublish in a mount namespace that the test does not see: it looks for nothing.
func (v *testVolume) unpublishUnseen(pod string) {
	v.t.Helper()
	ok[*csi.NodeUnpublishVolumeResponse](v.t)(v.NodeUnpublishVolume(v.t.Context(),
		&csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(pod)}))
}

// TestThreadsEnd: no thread keeps what a program was shown, also when the process's first thread is at hand.
func TestThreadsEnd(t *testing.T) {
	var met atomic.Bool
	for range 2000 {
		must(t, thread.Run(func() error {
			if unix.Gettid() == unix.Getpid() {
				met.Store(true)
			}
			return nil
		}))
	}
	if met.Load() {
		t.Error("the main thread was changed")
	}
}

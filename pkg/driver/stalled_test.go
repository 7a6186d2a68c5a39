package driver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
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

// mountStalled mounts, below dir and in this process's mount namespace, what a pod may have mounted: a file system with the
// name of a directory as its source, and directories of it that are named as devices are. From then on nobody who looks at
// one of them comes back.
func mountStalled(dir string) error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := &fuseDirs{fd: fd}
	go f.serve()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	fuse := filepath.Join(dir, "x")
	if err := unix.Mount(fuse, fuse, "fuse", 0, options); err != nil {
		return os.NewSyscallError("mount", err)
	}
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
	must(t, os.MkdirAll(filepath.Join(r.base, "pods", "x"), 0o700))
	self, err := os.Executable()
	must(t, err)
	plugin := &process{t: t, done: make(chan struct{}), cmd: exec.Command(self, "plugin", "--endpoint", r.endpoint("csi.sock"),
		"--pool", r.dir, "--engine", r.endpoint("engine.sock"), "--stalled", filepath.Join(r.base, "pods"))}
	plugin.cmd.Stderr = t.Output()
	plugin.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	must(t, plugin.cmd.Start())
	go func() { defer close(plugin.done); _ = plugin.cmd.Wait() }()
	t.Cleanup(plugin.kill) // and with it goes the server: whoever waits for it gets an error
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
		snap := v.snapshot("snap")
		v.unstage("pod")
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
	p := &programs{ns: ns, running: map[string]string{}, limit: 100 * time.Millisecond}
	endless := program{device: "/dev/null", limit: thorough, command: []string{"sh", "-c", "trap '' TERM; sleep 1000 & wait; sleep 1000"}}
	if _, err := p.run(endless); !errors.Is(err, context.DeadlineExceeded) || codeOf(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	p.limit = 0
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

package driver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// tenant is a container's process: root without a capability, in namespaces of its own, with a node of a volume's device.
type tenant struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// enter starts a tenant of a published block volume. It has the device open from then on.
func (v *testVolume) enter(pod string) *tenant {
	t := v.t
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(v.target(pod), &st))
	node := filepath.Join(v.base, fmt.Sprintf("container-%s-%s", pod, v.id))
	_ = os.Remove(node)
	must(t, unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev))) // as the container runtime does
	self, err := os.Executable()
	must(t, err)
	p := &tenant{t: t, cmd: exec.Command("unshare", "--mount", "--ipc", "--uts", "--net", "--", self, "contain",
		"setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", self, "tenant", node)}
	p.in, err = p.cmd.StdinPipe()
	must(t, err)
	out, err := p.cmd.StdoutPipe()
	must(t, err)
	p.out = bufio.NewReader(out)
	p.cmd.Stderr = t.Output()
	must(t, p.cmd.Start())
	t.Cleanup(p.leave)
	return p
}

// runContained runs a program in this process's mount namespace, which is a new one, without the disks that are mounted there.
func runContained(_ context.Context, args []string) error {
	if err := forgetDisks(); err != nil {
		return err
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return syscall.Exec(program, args, os.Environ())
}

// forgetDisks unmounts, in a mount namespace of this process's own, the copies of file systems on loop devices: they would keep
// the devices of other tests busy. A container has none either.
func forgetDisks() error {
	all, err := mounts()
	for _, m := range slices.Backward(all) {
		if m.isLoop() {
			err = errors.Join(err, unix.Unmount(m.path, unix.MNT_DETACH))
		}
	}
	return err
}

// leave ends the process.
func (p *tenant) leave() {
	_ = p.in.Close()
	_ = p.cmd.Wait()
}

// do has the tenant do something, and returns what came of it: "ok", a byte that it has read, or an error.
func (p *tenant) do(what string) string {
	p.t.Helper()
	_, err := fmt.Fprintln(p.in, what)
	must(p.t, err)
	line, err := p.out.ReadString('\n')
	must(p.t, err)
	return strings.TrimSpace(line)
}

// runTenant is the body of the process.
func runTenant(_ context.Context, args []string) error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil || !bytes.Contains(status, []byte("CapEff:\t0000000000000000")) {
		return fmt.Errorf("it has capabilities: %s (%w)", status, err)
	}
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		what, arg, _ := strings.Cut(lines.Text(), " ")
		n, _ := strconv.Atoi(arg)
		answer := "ok"
		var err error
		switch what {
		case "open":
			f, err = os.OpenFile(args[0], os.O_RDWR, 0)
		case "close":
			err = f.Close()
		case "read":
			answer, err = readOne(f)
		case "write":
			err = writeAll(f, byte(n))
		case "status":
			err = changeStatus(f, arg)
		case "clear":
			err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
		case "block":
			err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_BLOCK_SIZE, n)
		case "buffered":
			err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_DIRECT_IO, 0)
		case "capacity":
			err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0)
		case "file": // of its own
			err = changeFile(f)
		}
		if err != nil {
			answer = err.Error()
		}
		fmt.Println(answer)
	}
	return nil
}

const tenantBlock = 64 << 10

// readOne returns the byte of which the first blocks consist, read past the page cache.
func readOne(f *os.File) (string, error) {
	direct, err := os.OpenFile(f.Name(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return "", err
	}
	defer direct.Close()
	b := make([]byte, tenantBlock+4096)
	b = b[-int(uintptr(unsafe.Pointer(&b[0])))&4095:][:tenantBlock]
	n, err := direct.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if !bytes.Equal(b[:n], bytes.Repeat(b[:1], n)) {
		return "a mixture", nil
	}
	return fmt.Sprintf("%d bytes of %#x", n, b[0]), nil
}

func writeAll(f *os.File, b byte) error {
	_, err := f.WriteAt(bytes.Repeat([]byte{b}, tenantBlock), 0)
	return errors.Join(err, f.Sync())
}

func changeStatus(f *os.File, what string) error {
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return err
	}
	switch what {
	case "offset":
		info.Offset = 1 << 20
	case "limit":
		info.Sizelimit = 1 << 20
	case "name":
		copy(info.File_name[:], "csiq:somebody-else\x00")
	case "autoclear":
		info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	case "partitions":
		info.Flags |= unix.LO_FLAGS_PARTSCAN
	}
	return unix.IoctlLoopSetStatus64(int(f.Fd()), info)
}

func changeFile(f *os.File) error {
	fd, err := unix.MemfdCreate("x", 0)
	if err == nil {
		err = unix.Ftruncate(fd, 16<<20)
	}
	if err == nil {
		err = unix.IoctlSetInt(int(f.Fd()), 0x4C06 /* LOOP_CHANGE_FD */, fd)
	}
	return err
}

const (
	all65536 = "65536 bytes of "
	mine     = all65536 + "0xa1"
	theirs   = all65536 + "0xb2"
)

// device returns where a volume is attached.
func (v *testVolume) device() (a engine.Attachment) {
	v.t.Helper()
	list, err := v.client.List(v.t.Context())
	must(v.t, err)
	for _, one := range list {
		if one.VolumeID == v.id {
			a = one
		}
	}
	return a
}

// wantClean fails unless a volume's device is as it was made.
func (v *testVolume) wantClean() {
	t := v.t
	t.Helper()
	f, err := os.Open(v.device().Device)
	must(t, err)
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	must(t, err)
	block, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	must(t, err)
	readOnly, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	must(t, err)
	size, err := f.Seek(0, io.SeekEnd)
	must(t, err)
	name := unix.ByteSliceToString(info.File_name[:])
	if info.Offset != 0 || info.Sizelimit != 0 || info.Flags != unix.LO_FLAGS_DIRECT_IO || name != "csiq:"+v.id || block != 512 ||
		readOnly != 0 || size != v.size {
		t.Errorf("offset %d, limit %d, flags %#x, name %q, block size %d, read-only %d, %d bytes", info.Offset, info.Sizelimit, info.Flags,
			name, block, readOnly, size)
	}
}

// TestHostileTenant: whatever a pod does to its device, it never gets another's, which is undone or fails the volume alone.
func TestHostileTenant(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		what    string
		refused bool // by the kernel
		fails   bool // the volume
	}{
		{what: "clear"},
		{what: "status offset"},
		{what: "status limit"},
		{what: "status name"},
		{what: "status autoclear"},
		{what: "block 4096"},
		{what: "buffered"},
		{what: "capacity"},
		{what: "file", refused: true},
		{what: "status partitions", fails: true},
	} {
		a, b := r.create("a", 16*mib, blockCapability(writer)), r.create("b", 16*mib, blockCapability(writer))
		a.publish("pod")
		p := a.enter("pod")
		p.do("write 161")
		if got := p.do(c.what); (got != "ok") != c.refused {
			t.Fatalf("%s: %s", c.what, got)
		}
		p.do("close") // the last one of the tenant
		b.publish("pod")
		q := b.enter("pod")
		q.do("write 178")
		if a.device().Device == b.device().Device {
			t.Fatalf("%s: two volumes are %s", c.what, a.device().Device)
		}
		if c.fails {
			r.awaitReasons(a.id, "VolumeFailed")
			if got := p.do("read"); !strings.Contains(got, "input/output error") {
				t.Errorf("%s: a failed volume gives %q", c.what, got)
			}
			ok[*csi.NodeStageVolumeResponse](t)(r.NodeStageVolume(t.Context(), a.stageRequest()))
		}
		r.awaitReasons(a.id)
		r.awaitReasons(b.id)
		a.wantClean()
		p.leave()
		a.unpublish("pod")
		a.publish("pod") // the next pod
		p = a.enter("pod")
		if got := p.do("read"); got != mine {
			t.Errorf("%s: the next pod reads %q", c.what, got)
		}
		p.do("write 161")
		if got := q.do("read"); got != theirs {
			t.Errorf("%s: the other tenant reads %q", c.what, got)
		}
		if got := p.do("read"); got != mine {
			t.Errorf("%s: reads %q", c.what, got)
		}
		a.unpublish("pod")
		_, err := r.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: a.id, StagingTargetPath: a.stagingPath()})
		if codeOfCall(err) != "FailedPrecondition" { // the tenant has it open
			t.Errorf("%s: unstaged while it is open: %v", c.what, err)
		}
		if got := p.do("read"); got != mine {
			t.Errorf("%s: reads %q after its volume could not be unstaged", c.what, got)
		}
		p.leave()
		q.leave()
		a.unstage()
		b.unstage("pod")
		a.delete()
		b.delete()
	}
	r.wantEmpty()
}

// TestLosetup: a program of the host that detaches the device with losetup takes it from nobody, in use or not.
func TestLosetup(t *testing.T) {
	r := newRig(t)
	v := r.create("a", 16*mib, blockCapability(writer))
	v.publish("pod")
	device := v.device().Device
	run(t, "losetup", "--detach", device)
	r.awaitReasons(v.id)
	if now := v.device().Device; now != device {
		t.Errorf("it was %s and is %s", device, now)
	}
	v.wantClean()
	p := v.enter("pod")
	p.do("write 161")
	run(t, "losetup", "--detach", device)
	if got := p.do("read"); got != mine {
		t.Errorf("it reads %q", got)
	}
	p.leave()
	r.awaitReasons(v.id)
	v.wantClean()
	v.unstage("pod")
	v.delete()
	r.wantEmpty()
}

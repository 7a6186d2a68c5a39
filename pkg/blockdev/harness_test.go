package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// testPrefix begins the name of every device of these tests; the process and the test follow.
const testPrefix = "blockdev-test:"

func TestMain(m *testing.M) {
	if file := os.Getenv(helperEnv); file != "" {
		os.Exit(helper(file))
	}
	if what := os.Getenv(cutEnv); what != "" {
		os.Exit(cutProcess(what))
	}
	if err := clearLeftovers(func(pid int) bool { return pid != os.Getpid() && unix.Kill(pid, 0) == unix.ESRCH }); err != nil {
		fmt.Fprintln(os.Stderr, "clear what an earlier run left:", err)
		os.Exit(1)
	}
	code := m.Run()
	left, err := Find(testPrefix + strconv.Itoa(os.Getpid()) + ":")
	if len(left) != 0 || err != nil {
		fmt.Fprintln(os.Stderr, "devices left:", left, err)
		code = 1
	}
	os.Exit(code)
}

// clearLeftovers removes the devices of test processes that match, and what is mounted from them.
func clearLeftovers(match func(pid int) bool) error {
	devices, err := Find(testPrefix)
	if err != nil {
		return err
	}
	for _, d := range devices {
		pid, err := strconv.Atoi(strings.Split(d.Name, ":")[1])
		if err != nil || !match(pid) {
			continue
		}
		for _, dir := range mountsOf(d.Path) {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if err := Clear(d.Path, d.Name); err != nil {
			return err
		}
	}
	return nil
}

// mountsOf returns the mount points of a device.
func mountsOf(device string) []string {
	b, _ := os.ReadFile("/proc/self/mounts")
	var dirs []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == device {
			dirs = append(dirs, f[1])
		}
	}
	return dirs
}

// deviceName returns the name of a device of a test in this process.
func deviceName(test string) string {
	return fmt.Sprintf("%s%d:%s", testPrefix, os.Getpid(), strings.ReplaceAll(test[max(0, len(test)-32):], "/", "."))
}

type span struct{ off, n int64 }

// testBackend is a sparse file that counts, and fails on request.
type testBackend struct {
	file *os.File
	size atomic.Int64

	flushes atomic.Int64
	// fail, if set, is asked before each operation: "read", "write", "discard", "zero", "flush".
	fail atomic.Pointer[func(op string) error]
	// short makes reads and writes do that many bytes less.
	short atomic.Int64

	mu        sync.Mutex // guards the below
	discarded []span
	zeroed    []span
}

func newBackend(t *testing.T, size int64) *testBackend {
	t.Helper()
	return openBackend(t, filepath.Join(t.TempDir(), "volume"), size)
}

func openBackend(t *testing.T, path string, size int64) *testBackend {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	b := &testBackend{file: f}
	b.grow(t, size)
	return b
}

func (b *testBackend) grow(t *testing.T, size int64) {
	t.Helper()
	must(t, b.file.Truncate(size))
	b.size.Store(size)
}

func (b *testBackend) failWith(f func(op string) error) { b.fail.Store(&f) }
func (b *testBackend) heal()                            { b.fail.Store(nil); b.short.Store(0) }

func (b *testBackend) check(op string) error {
	if f := b.fail.Load(); f != nil {
		return (*f)(op)
	}
	return nil
}

func (b *testBackend) ReadAt(p []byte, off int64) (int, error) {
	if err := b.check("read"); err != nil {
		return 0, err
	}
	return b.file.ReadAt(p[:len(p)-int(b.short.Load())], off)
}

func (b *testBackend) WriteAt(p []byte, off int64) (int, error) {
	if err := b.check("write"); err != nil {
		return 0, err
	}
	return b.file.WriteAt(p[:len(p)-int(b.short.Load())], off)
}

func (b *testBackend) Discard(off, n int64) error {
	if err := b.check("discard"); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.discarded = append(b.discarded, span{off, n})
	return unix.Fallocate(int(b.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (b *testBackend) WriteZeroes(off, n int64) error {
	if err := b.check("zero"); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.zeroed = append(b.zeroed, span{off, n})
	return unix.Fallocate(int(b.file.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (b *testBackend) Flush() error {
	if err := b.check("flush"); err != nil {
		return err
	}
	b.flushes.Add(1)
	return nil
}

func (b *testBackend) Size() int64 { return b.size.Load() }

// spans returns what was discarded and zeroed since the last call.
func (b *testBackend) spans() (discarded, zeroed []span) {
	b.mu.Lock()
	defer b.mu.Unlock()
	discarded, zeroed, b.discarded, b.zeroed = b.discarded, b.zeroed, nil, nil
	return discarded, zeroed
}

// attach attaches b for the time of the test.
func attach(t *testing.T, b Backend, o Options) *Device {
	t.Helper()
	if o.Name == "" {
		o.Name = deviceName(t.Name())
	}
	d, err := Attach(b, o)
	must(t, err)
	t.Cleanup(func() {
		// What the test has left open or mounted on it must not outlive it.
		if err := d.Detach(); err != nil {
			t.Errorf("detach at the end: %v", err)
			for _, dir := range mountsOf(d.Path()) {
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
			_ = d.Abort()
		}
	})
	return d
}

// directIO opens a device with O_DIRECT.
func directIO(t *testing.T, path string) *os.File {
	t.Helper()
	return openDevice(t, path, os.O_RDWR|unix.O_DIRECT)
}

func openDevice(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned returns memory that direct I/O accepts.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip:][:n]
}

// stamp fills p, whole blocks of 512 bytes, with a pattern that no other offset or seed has.
func stamp(p []byte, off int64, seed byte) {
	block := make([]byte, 512)
	for i := range block {
		block[i] = byte(i) ^ seed
	}
	for ; len(p) > 0; p, off = p[512:], off+512 {
		copy(p, block)
		binary.NativeEndian.PutUint64(p, uint64(off))
		binary.NativeEndian.PutUint64(p[504:], ^uint64(off))
	}
}

// sysfs reads an attribute of a device.
func sysfs(t *testing.T, device, attribute string) string {
	t.Helper()
	number, _ := loopNumber(filepath.Base(device))
	b, err := os.ReadFile(loopSysfs(number, attribute))
	must(t, err)
	return strings.TrimSpace(string(b))
}

// run runs a command that must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// waitFor waits for a condition; the bound is only there to end a broken test.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

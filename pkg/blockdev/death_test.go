package blockdev

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// helperEnv holds the file that the test binary, started as a helper, serves.
const helperEnv = "BLOCKDEV_TEST_HELPER"

// helper serves a file, prints the device's path, and waits to be killed.
func helper(path string) int {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	b := &testBackend{file: f}
	b.size.Store(4 << 20)
	d, err := Attach(b, Options{Name: fmt.Sprintf("%s%d:helper", testPrefix, os.Getpid())})
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	fmt.Println(d.Path())
	_, _ = io.Copy(io.Discard, os.Stdin) // ends with the test
	_ = d.Abort()
	return 0
}

// startHelper starts a server in a process of its own.
func startHelper(t *testing.T) (cmd *exec.Cmd, device string) {
	t.Helper()
	b := newBackend(t, 4<<20)
	cmd = exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+b.file.Name())
	cmd.Stderr = os.Stderr
	_, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		must(t, clearLeftovers(func(pid int) bool { return pid == cmd.Process.Pid }))
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	device = strings.TrimSpace(line)
	if !strings.HasPrefix(device, "/dev/loop") {
		t.Fatalf("helper: %s", line)
	}
	return cmd, device
}

func TestServerKilled(t *testing.T) {
	cmd, path := startHelper(t)
	f := directIO(t, path)
	var wg sync.WaitGroup
	started := make(chan struct{}, 8)
	for i := range 8 {
		wg.Go(func() {
			buf := aligned(64 << 10)
			for n := 0; ; n++ {
				if _, err := f.WriteAt(buf, int64(i)*int64(len(buf))); err != nil {
					wantErr(t, "write to a dead server's device", err, unix.EIO)
					return
				}
				if n == 10 {
					started <- struct{}{}
				}
			}
		})
	}
	for range 8 {
		<-started
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	wg.Wait() // each with an error, none hangs

	prefix := testPrefix + strconv.Itoa(cmd.Process.Pid) + ":"
	found, err := Find(prefix)
	must(t, err)
	if len(found) != 1 || found[0] != (Info{path, prefix + "helper", 4 << 20}) {
		t.Fatalf("Find: %v", found)
	}
	_, err = f.ReadAt(aligned(4096), 0)
	wantErr(t, "read from a dead server's device", err, unix.EIO)
	wantErr(t, "fsync", f.Sync(), unix.EIO)

	wantErr(t, "clear while open", Clear(path, helperName(cmd)), ErrBusy)
	must(t, f.Close()) // the last close removes it
	must(t, Clear(path, helperName(cmd)))
	found, err = Find(prefix)
	must(t, err)
	if len(found) != 0 {
		t.Errorf("still there: %v", found)
	}
}

// TestServerKilledUnderFileSystem: everything that touches the file system ends, and so does the device.
func TestServerKilledUnderFileSystem(t *testing.T) {
	cmd, path := startHelper(t)
	run(t, "mkfs.ext4", "-q", path)
	dir := t.TempDir()
	mount(t, path, dir, "ext4")
	f, err := os.Create(filepath.Join(dir, "file"))
	must(t, err)
	_, err = f.Write(make([]byte, 64<<10))
	must(t, err)
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	if err := f.Sync(); err == nil {
		t.Error("a file was synced to a dead server's device")
	}
	f.Close()
	wantErr(t, "clear while mounted", Clear(path, helperName(cmd)), ErrBusy)
	must(t, unix.Unmount(dir, 0))
	must(t, Clear(path, helperName(cmd)))
}

// TestClearUnused: nobody has the dead server's device open.
func TestClearUnused(t *testing.T) {
	cmd, path := startHelper(t)
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	must(t, Clear(path, helperName(cmd)))
	if found, err := Find(testPrefix + strconv.Itoa(cmd.Process.Pid)); len(found) != 0 || err != nil {
		t.Error(found, err)
	}
	must(t, Clear(path, helperName(cmd)))
	for _, bad := range []string{"", "/dev/loop", "/dev/loop-1", "/dev/sda", "loop0", "/tmp/loop0", "/dev/loop01"} {
		if err := Clear(bad, "x"); err == nil || errors.Is(err, ErrBusy) {
			t.Errorf("Clear(%q): %v", bad, err)
		}
	}
}

func TestAbort(t *testing.T) {
	b := newBackend(t, 4<<20)
	d := attach(t, b, Options{})
	f := directIO(t, d.Path())

	// Requests that the backend does not answer, more than there are threads.
	release := make(chan struct{})
	b.failWith(func(string) error { <-release; return nil })
	errs := make(chan error)
	const stuck = 2 * serverThreads
	for i := range stuck {
		go func() {
			_, err := f.WriteAt(aligned(4096), int64(i)*4096)
			errs <- err
		}()
	}
	waitFor(t, "requests in hand", func() bool { return d.Waiting() == serverThreads })
	must(t, d.Abort())
	for range stuck {
		wantErr(t, "write in flight", <-errs, unix.EIO)
	}
	select {
	case <-d.Done():
		t.Error("Done while the backend works")
	default:
	}
	close(release)
	<-d.Done()
	_, err := f.ReadAt(aligned(4096), 0)
	wantErr(t, "read after Abort", err, unix.EIO)
	wantErr(t, "detach while open", d.Detach(), ErrBusy)
	must(t, d.Abort())
	must(t, f.Close())
	must(t, d.Detach())
	must(t, d.Abort())
}

// TestAbortOfUnused: then nothing of it is left at once.
func TestAbortOfUnused(t *testing.T) {
	d := attach(t, newBackend(t, 1<<20), Options{})
	must(t, d.Abort())
	<-d.Done()
	if found, err := Find(deviceName(t.Name())); len(found) != 0 || err != nil {
		t.Error(found, err)
	}
	must(t, d.Detach())
}

// TestAbortUnblocksDetach: Detach writes the page cache back, and a backend that hangs makes it hang.
func TestAbortUnblocksDetach(t *testing.T) {
	b := newBackend(t, 1<<20)
	d := attach(t, b, Options{})
	release := make(chan struct{})
	stuck := make(chan struct{}, 1)
	b.failWith(func(op string) error {
		if op == "write" {
			select {
			case stuck <- struct{}{}:
			default:
			}
			<-release
		}
		return nil
	})
	f := openDevice(t, d.Path(), os.O_WRONLY)
	_, err := f.WriteAt(make([]byte, 4096), 0)
	must(t, err)
	closed := make(chan struct{})
	go func() { _ = f.Sync(); f.Close(); close(closed) }() // writes the page cache back: hangs
	<-stuck
	detached := make(chan error)
	go func() { detached <- d.Detach() }()
	must(t, d.Abort())
	<-closed
	close(release)
	err = <-detached
	for errors.Is(err, ErrBusy) {
		err = d.Detach()
	}
	must(t, err)
}

// helperName is the name of a helper's device.
func helperName(cmd *exec.Cmd) string { return fmt.Sprintf("%s%d:helper", testPrefix, cmd.Process.Pid) }

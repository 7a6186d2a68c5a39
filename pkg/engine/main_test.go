package engine

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
)

// The test binary is also the worker, and the supervisor of the tests that kill one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "worker":
			os.Exit(exitCode(runTestWorker(os.Args[2:])))
		case "supervisor":
			os.Exit(exitCode(runTestSupervisor(os.Args[2:])))
		case "helper":
			os.Exit(exitCode(helper.Run()))
		case "writer":
			os.Exit(exitCode(holdWrite(os.Args[2])))
		case "holder":
			os.Exit(exitCode(runTestHolder(os.Args[2])))
		}
	}
	removeLeftovers()
	if os.Getenv("GORACE") == "" { // else each process of a race build ends a second late
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0")
	}
	os.Exit(m.Run())
}

func exitCode(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
		return 1
	}
	return 0
}

func runTestWorker(args []string) error {
	flags := flag.NewFlagSet("worker", flag.ExitOnError)
	var o worker.Options
	flags.StringVar(&o.PoolDir, "pool", "", "")
	flags.StringVar(&o.Volume, "volume", "", "")
	flags.StringVar(&o.Holder, "holder", "", "")
	flags.BoolVar(&o.Journal, "journal", false, "")
	_ = flags.Parse(args)
	breakRingOnSignal()
	return worker.Run(mainContext(), o)
}

// breakRingOnSignal makes SIGUSR1 put another file in the place of this process's io_uring.
func breakRingOnSignal() {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	go func() {
		<-told
		null, err := os.Open(os.DevNull)
		if err != nil {
			panic(err)
		}
		fds, _ := filepath.Glob("/proc/self/fd/*")
		for _, fd := range fds {
			if target, err := os.Readlink(fd); err == nil && target == "anon_inode:[io_uring]" {
				n, _ := strconv.Atoi(filepath.Base(fd))
				_ = unix.Dup3(int(null.Fd()), n, unix.O_CLOEXEC)
			}
		}
	}()
}

func runTestSupervisor(args []string) error {
	flags := flag.NewFlagSet("supervisor", flag.ExitOnError)
	o := Options{}
	flags.StringVar(&o.Listen, "listen", "", "")
	flags.StringVar(&o.PoolDir, "pool", "", "")
	flags.StringVar(&o.Holder, "holder", "", "")
	flags.DurationVar(&o.IOTimeout, "io-timeout", 0, "")
	flags.BoolVar(&o.Journal, "journal", false, "")
	ready := flags.String("ready-file", "", "")
	hang := flags.String("hang-frozen", "", "a file to create when a file system is frozen; it stays so")
	flags.DurationVar(&o.hooks.maxFreezing, "max-freezing", 0, "")
	flags.DurationVar(&o.hooks.orphanPatience, "orphan-patience", 0, "")
	_ = flags.Parse(args)
	if *ready != "" {
		o.Ready = func() { _ = os.WriteFile(*ready, nil, 0o600) }
	}
	exitWithTest()
	ctx, stop := signal.NotifyContext(mainContext(), syscall.SIGTERM)
	defer stop()
	if *hang != "" {
		o.hooks.frozen = func() {
			_ = os.WriteFile(*hang, nil, 0o600)
			<-ctx.Done()
		}
	}
	return Run(ctx, o)
}

// holdWrite is in the middle of a write to a file until it is killed.
func holdWrite(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	empty, _, err := os.Pipe()
	if err != nil {
		return err
	}
	_, err = unix.Splice(int(empty.Fd()), nil, int(f.Fd()), nil, 4096, 0)
	return err
}

func runTestHolder(socket string) error {
	exitWithTest()
	ctx, stop := signal.NotifyContext(mainContext(), syscall.SIGTERM)
	defer stop()
	return holder.Run(ctx, holder.Options{Socket: socket})
}

// exitWithTest ends this process when the test that holds the other end of its input has died. The test may have threads
// that wait for a device of ours: they keep its files open, but not its process alive.
func exitWithTest() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2)
	}()
	parent := fmt.Sprintf("/proc/%d/stat", os.Getppid())
	go func() {
		for range time.Tick(time.Second) {
			if b, err := os.ReadFile(parent); err != nil || bytes.Contains(b, []byte(") Z ")) {
				os.Exit(2)
			}
		}
	}()
}

// testVolumePrefix begins the names of the tests' volumes; the process ID of the test follows.
const testVolumePrefix = "engtest-"

// removeLeftovers removes the mounts and devices that a killed run of these tests left.
func removeLeftovers() {
	devices, err := blockdev.Find(worker.DevicePrefix + testVolumePrefix)
	if err != nil {
		fmt.Fprintln(os.Stderr, "look for leftovers:", err)
	}
	for _, d := range devices {
		pid, _, _ := strings.Cut(strings.TrimPrefix(d.Name, worker.DevicePrefix+testVolumePrefix), "-")
		if n, err := strconv.Atoi(pid); err != nil || unix.Kill(n, 0) == nil {
			continue // its test is running
		}
		_ = helper.Ask(mainContext(), helper.Request{Op: helper.ThawDevice, Device: d.Path})
		unmountAll(d.Path)
		_ = blockdev.Clear(d.Path, d.Name)
	}
}

// unmountAll unmounts whatever is mounted from a device.
func unmountAll(device string) {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) > 1 && fields[0] == device {
			_ = unix.Unmount(fields[1], unix.MNT_DETACH)
		}
	}
}

// mainContext is what main starts from.
func mainContext() context.Context {
	return context.Background() //nolint:forbidigo // this binary's main
}

package driver

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// The test binary is also the engine, its workers, the plugin of the tests that kill one, and a pod's file system.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		run := map[string]func(context.Context, []string) error{
			"worker": runTestWorker, "helper": runTestHelper, "engine": runTestEngine, "plugin": runTestPlugin,
			"stalled": runStalled, "tenant": runTenant, "contain": runContained, "holder": runTestHolder,
		}[os.Args[1]]
		if run != nil {
			os.Exit(exitCode(run))
		}
	}
	if os.Getenv("GORACE") == "" { // else each process of a race build ends a second late
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0")
	}
	removeLeftovers()
	os.Exit(m.Run())
}

func exitCode(run func(context.Context, []string) error) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM) //nolint:forbidigo // this is a main
	defer stop()
	if err := run(ctx, os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
		return 1
	}
	return 0
}

func runTestWorker(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("worker", flag.ExitOnError)
	var o worker.Options
	flags.StringVar(&o.PoolDir, "pool", "", "")
	flags.StringVar(&o.Volume, "volume", "", "")
	flags.StringVar(&o.Holder, "holder", "", "")
	_ = flags.Parse(args)
	return worker.Run(ctx, o)
}

func runTestHelper(context.Context, []string) error { return helper.Run() }

func runTestEngine(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("engine", flag.ExitOnError)
	o := engine.Options{Version: "test"}
	flags.StringVar(&o.Listen, "listen", "", "")
	flags.StringVar(&o.PoolDir, "pool", "", "")
	flags.StringVar(&o.NodeID, "node-id", "", "")
	flags.StringVar(&o.Holder, "holder", "", "")
	_ = flags.Parse(args)
	return engine.Run(ctx, o)
}

func runTestHolder(ctx context.Context, args []string) error {
	return holder.Run(ctx, holder.Options{Socket: args[0]})
}

func runTestPlugin(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("plugin", flag.ExitOnError)
	o := Options{NodeID: testNode, Version: "test"}
	flags.StringVar(&o.Endpoint, "endpoint", "", "")
	flags.StringVar(&o.PoolDir, "pool", "", "")
	engineEndpoint := flags.String("engine", "", "")
	_ = flags.Parse(args)
	client, err := engine.NewClient(*engineEndpoint)
	if err != nil {
		return err
	}
	defer client.Close()
	o.Engine = client
	return Run(ctx, o)
}

// basePrefix begins the names of the tests' directories; the process ID of the test follows.
const basePrefix = "csiq-drv-"

// removeLeftovers removes the mounts and devices that a killed run of these tests left, and its directories.
func removeLeftovers() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), basePrefix+"*"))
	for _, dir := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), basePrefix), "-")
		if n, err := strconv.Atoi(pid); err != nil || unix.Kill(n, 0) == nil {
			continue // its test is running
		}
		cleanUnder(dir)
		_ = unix.Unmount(filepath.Join(dir, "pool"), unix.MNT_DETACH)
		_ = os.RemoveAll(dir)
	}
}

// cleanUnder unmounts what is mounted under a test's directory, except its pool, and clears the pool's devices.
func cleanUnder(dir string) {
	poolDir := filepath.Join(dir, "pool")
	p, poolErr := pool.Open(poolDir)
	devices, _ := blockdev.Find("csiq:")
	infos, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	for _, m := range slices.Backward(infos) {
		if m.Mountpoint != poolDir {
			_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH)
		}
	}
	for _, d := range devices {
		if poolErr == nil && p.Owns(strings.TrimPrefix(d.Name, "csiq:")) {
			_ = blockdev.Clear(d.Path, d.Name)
		}
	}
}

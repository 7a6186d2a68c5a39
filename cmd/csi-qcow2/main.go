// Command csi-qcow2 is a Kubernetes CSI driver whose volumes are qcow2 images and whose volume snapshots
// are the images' internal snapshots. The one binary is the CSI plugin (node), the server of the block
// devices (engine), the tool for pools and images on the command line, and a demonstration of it all.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// version is set by the linker.
var version = "unknown"

func main() {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup(1) means it
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	// The first signal ends the work in an orderly way. Another one, a moment later (some senders send two at
	// once), ends the process.
	context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, stop) })
	err := newRootCommand().ExecuteContext(ctx)
	os.Exit(exitStatus(ctx, os.Stderr, err))
}

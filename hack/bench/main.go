// Bench measures csi-qcow2 beside QEMU in one run, on images of the same layout: pairs of runs in turn, medians, ratios.
// It prints Markdown and, with -json, writes the figures for machines. All that it makes lies in one directory, which it
// removes.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench is a run and what it is given.
type bench struct {
	dir     string // scratch space
	program string // csi-qcow2
	pairs   int
	load    time.Duration // of the guest before, between and after operations
	sizes   []string      // of disks, as qemu-img understands them
	hosts   string        // the pause part's file systems
	only    *regexp.Regexp
	report  report
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) //nolint:forbidigo // this is main
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var b bench
	var only, sizes, parent, jsonPath string
	flag.StringVar(&b.program, "program", "bin/csi-qcow2", "the program to measure")
	flag.StringVar(&only, "run", ".", "run the parts whose name matches")
	flag.StringVar(&sizes, "sizes", "64G,256G,1T", "sizes of fully mapped disks")
	flag.IntVar(&b.pairs, "pairs", 5, "pairs of runs of which the median is taken")
	flag.DurationVar(&b.load, "load", 3*time.Second, "how long a guest works before and after an operation")
	flag.StringVar(&b.hosts, "hosts", "ext4,XFS,btrfs", "the file systems that the pause part's pools are on")
	flag.StringVar(&parent, "dir", "/var/tmp", "where to make scratch files")
	flag.StringVar(&jsonPath, "json", "", "write the figures to this file, too")
	raw := flag.String("pass-through", "", "serve this raw file as the io part's ceiling, and nothing else")
	flag.Parse()
	if *raw != "" {
		return passThrough(ctx, *raw)
	}
	var err error
	if b.only, err = regexp.Compile(only); err != nil {
		return err
	}
	b.sizes = strings.Split(sizes, ",")
	if b.dir, err = os.MkdirTemp(parent, "csi-qcow2-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)

	fmt.Printf("%d pairs; load average %s", b.pairs, firstWords("/proc/loadavg", 3))
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"offline", b.offline},
		{"calls", b.calls},
		{"open", b.open},
		{"online", b.online},
		{"throughput", b.throughput},
		{"pause", b.pause},
		{"fsync", b.fsync},
		{"restore", b.restore},
		{"layout", b.layout},
		{"io", b.io},
		{"allocate", b.allocate},
		{"files", b.files},
	} {
		if !b.only.MatchString(part.name) {
			continue
		}
		fmt.Printf("\n\n## %s\n\n", part.name)
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	fmt.Printf("\nload average at the end %s\n", firstWords("/proc/loadavg", 3))
	if jsonPath == "" {
		return nil
	}
	out, err := json.MarshalIndent(b.report, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(jsonPath, append(out, '\n'), 0o600)
}

// command runs a program and returns how long it took.
func command(ctx context.Context, name string, args ...string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return time.Since(start), nil
}

// firstWords returns the first words of a file.
func firstWords(path string, n int) string {
	b, _ := os.ReadFile(path) // for people
	words := strings.Fields(string(b))
	return strings.Join(words[:min(n, len(words))], " ")
}

// parseSize reads a size as qemu-img does.
func parseSize(s string) (int64, error) {
	shift := strings.Index("KMGT", s[len(s)-1:])
	if shift < 0 {
		return strconv.ParseInt(s, 10, 64)
	}
	n, err := strconv.ParseInt(s[:len(s)-1], 10, 64)
	return n << (10 * (shift + 1)), err
}

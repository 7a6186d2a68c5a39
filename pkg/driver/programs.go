package driver

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// quick is for programs that do little: beyond it, the device does not answer. Nor does it, for any program, when it has
	// moved nothing, and the program has not computed either, for as long.
	quick = time.Minute
	// thorough is for those that may look at, or write, much of a device. kubelet repeats a call that takes more than two
	// minutes, and is told that it is under way.
	thorough = time.Hour
	// dying is what a program that is killed gets to end. One that the kernel has in an operation on a dead disk does not.
	dying = 5 * time.Second
)

// programs runs mkfs, mount and the like, each for a device. One that does not end in time, or makes no progress, is killed.
// If it outlives even that, no other one is run for the device until it has ended.
type programs struct {
	ns *namespace
	// patience replaces quick, if it is not 0: for tests.
	patience time.Duration

	mu      sync.Mutex
	running map[string]string // by device, what has not ended; guarded by mu
}

// program is a program to be run.
type program struct {
	device  string // for which it is run
	limit   time.Duration
	visible bool   // it sees all mounts, as mount and umount must
	mounted string // shown to it at scratch, unless empty
	command []string
}

// outcome is how a program ended by itself.
type outcome struct {
	command string
	status  int    // its exit status
	output  string // both streams
}

// err says that the program failed.
func (o outcome) err() error {
	return fmt.Errorf("%s: exit status %d: %s", o.command, o.status, strings.TrimSpace(o.output))
}

// run runs a program to its end, whatever becomes of the caller's caller: who repeats the call finds its work done. There is
// no error if it ended by itself, whatever its exit status.
func (p *programs) run(what program) (outcome, error) {
	o := outcome{command: strings.Join(what.command, " ")}
	if err := p.begin(what.device, o.command); err != nil {
		return o, err
	}
	var output bytes.Buffer
	cmd := exec.Command(what.command[0], what.command[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = &output, &output, "/"
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.start(cmd, what); err != nil {
		p.end(what.device)
		return o, err
	}
	ended := make(chan error, 1)
	go func() { // ends with the process, which may be never: the kernel has it
		err := cmd.Wait()
		p.end(what.device)
		ended <- err
	}()
	err, inTime := p.await(ended, what, cmd.Process.Pid)
	if !inTime {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		late := fmt.Errorf("%s: killed, it did not end in time: %w", o.command, context.DeadlineExceeded)
		if _, dead := await(ended, dying); !dead {
			late = fmt.Errorf("%w; the kernel has it, which the disk may not answer", late)
		}
		return o, late
	}
	o.status, o.output = cmd.ProcessState.ExitCode(), output.String()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return o, nil
	}
	if err != nil {
		return o, fmt.Errorf("%s: %w: %s", o.command, err, strings.TrimSpace(o.output))
	}
	return o, nil
}

// mustRun is run for a program whose exit status has to be 0.
func (p *programs) mustRun(what program) error {
	o, err := p.run(what)
	if err == nil && o.status != 0 {
		err = o.err()
	}
	return err
}

func (p *programs) start(cmd *exec.Cmd, what program) error {
	if what.visible {
		return cmd.Start()
	}
	return p.ns.start(what.mounted, cmd.Start)
}

// begin is errBusy while another program runs for the device.
func (p *programs) begin(device, command string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if other, busy := p.running[device]; busy {
		return fmt.Errorf("%w: %s has not ended", errBusy, other)
	}
	p.running[device] = command
	return nil
}

func (p *programs) end(device string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.running, device)
}

// await waits for a program as long as it makes progress, and not longer than its limit.
func (p *programs) await(ended <-chan error, what program, pid int) (err error, inTime bool) { //nolint:revive // as below
	patience := cmp.Or(p.patience, quick)
	deadline := time.Now().Add(what.limit)
	for before := ""; time.Now().Before(deadline); {
		now := progress(what.device, pid)
		if before != "" && now == before {
			break
		}
		before = now
		if err, inTime = await(ended, patience); inTime {
			return err, true
		}
	}
	return nil, false
}

// progress is something that changes while a program computes, or the device moves something.
func progress(device string, pid int) string {
	moved, _ := os.ReadFile("/sys/class/block/" + filepath.Base(device) + "/stat")
	fields := strings.Fields(string(moved))
	if len(fields) > 7 {
		fields = []string{fields[2], fields[6]} // sectors read and written: the rest counts waiting, too
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, status, _ = bytes.Cut(status, []byte(") "))
	if times := strings.Fields(string(status)); len(times) > 12 {
		fields = append(fields, times[11], times[12]) // computing, in the program and in the kernel
	}
	return strings.Join(fields, " ")
}

// await waits for what comes, but not longer than limit.
func await(from <-chan error, limit time.Duration) (err error, inTime bool) { //nolint:revive // the error is what it waits for
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case err := <-from:
		return err, true
	case <-timeout.C:
		return nil, false
	}
}

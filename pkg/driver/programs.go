package driver

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// programs runs mkfs, fsck and the like.
type programs struct{}

// outcome is how a program ended.
type outcome struct {
	command string
	status  int    // its exit status
	output  string // both streams
}

// err says that a program failed.
func (o outcome) err() error {
	return fmt.Errorf("%s: exit status %d: %s", o.command, o.status, strings.TrimSpace(o.output))
}

// run runs a program. The error is not nil unless it ended by itself, whatever its exit status.
func (p *programs) run(ctx context.Context, name string, args ...string) (outcome, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	o := outcome{command: strings.Join(cmd.Args, " "), status: cmd.ProcessState.ExitCode(), output: string(out)}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		err = nil
	}
	if err != nil {
		return o, fmt.Errorf("%s: %w: %s", o.command, errors.Join(ctx.Err(), err), strings.TrimSpace(o.output))
	}
	return o, nil
}

// mustRun is run for a program whose exit status has to be 0.
func (p *programs) mustRun(ctx context.Context, name string, args ...string) (outcome, error) {
	o, err := p.run(ctx, name, args...)
	if err == nil && o.status != 0 {
		err = o.err()
	}
	return o, err
}

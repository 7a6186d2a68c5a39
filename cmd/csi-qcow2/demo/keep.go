package demo

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// pauser returns what waits for a line of in before each step. On a terminal its prompt gives way to the step.
func pauser(ctx context.Context, in io.Reader, out io.Writer, terminal bool) func(next string) error {
	lines := make(chan struct{})
	asked := make(chan struct{})
	// A read from a terminal cannot be interrupted: then the goroutine stays, and ends with the process. It reads only when it is
	// asked to: what is typed later may be for somebody else.
	go func() {
		defer close(lines)
		for scanner := bufio.NewScanner(in); ; {
			select {
			case <-asked:
			case <-ctx.Done():
				return
			}
			if !scanner.Scan() {
				return
			}
			lines <- struct{}{}
		}
	}()
	ended := false
	return func(next string) error {
		if ended {
			return ctx.Err()
		}
		fmt.Fprintf(out, "%s[Enter] %s … ", margin, next)
		select {
		case asked <- struct{}{}:
		case <-lines: // at its end
			ended = true
			fmt.Fprintln(out)
			return ctx.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case _, more := <-lines:
			if ended = !more; more && terminal {
				fmt.Fprint(out, "\x1b[A\x1b[J")
			}
			return ctx.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// keep gives the user a shell in the pool, with everything as the demonstration has left it.
func (p *play) keep(ctx context.Context, in io.Reader, out, errOut io.Writer) {
	if p.err != nil {
		return
	}
	p.title("Yours to try")
	bin := p.world.path("bin")
	p.err = os.Mkdir(bin, 0o700)
	if p.err == nil {
		p.err = os.Symlink(p.world.program, filepath.Join(bin, "csi-qcow2"))
	}
	if p.err != nil {
		return
	}
	fmt.Fprintf(p.w, `Engine and plugin go on. This is a shell in the pool; its end ends everything.
Volumes are mounted at %s/NAME/volume. For example:

  csi-qcow2 volume list
  csi-qcow2 volume show files-again
  csi-qcow2 image snapshot list volumes/block-*/image.qcow2
  ls ../files-again/volume

`, p.world.dir)
	shell := exec.CommandContext(ctx, cmp.Or(os.Getenv("SHELL"), "/bin/sh"))
	shell.Dir = p.world.pool.Dir()
	shell.Env = append(os.Environ(), p.world.environment()...)
	shell.Env = append(shell.Env, "PATH="+bin+":"+os.Getenv("PATH"))
	shell.Stdin, shell.Stdout, shell.Stderr = in, out, errOut
	err := shell.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil {
		p.err = ctx.Err()
	} else if err != nil && !errors.As(err, &exit) { // how its last command ended is the user's
		p.err = err
	}
}

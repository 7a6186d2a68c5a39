package demo

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// stopTime is how long a process may take to end by itself.
const stopTime = 20 * time.Second

// process is a running copy of this program.
type process struct {
	name string
	log  string // file of its output
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	exit error         // how; read after done
}

// startProcess starts program with args; its output goes to a file in dir. mark is put into its
// environment, by which its own children can be told too.
func startProcess(dir, mark, program string, args ...string) (*process, error) {
	p := &process{name: args[0], log: filepath.Join(dir, args[0]+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd = exec.Command(program, args...) //nolint:noctx // stop ends it, in order and after the context
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), mark)
	// A group of its own: a terminal's interrupt is for us, who then stop it in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		defer close(p.done)
		p.exit = p.cmd.Wait()
	}()
	return p, nil
}

// stop ends the process and waits for it; one that does not end by itself is killed.
func (p *process) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	select {
	case <-p.done:
		return fmt.Errorf("the %s ended by itself: %w", p.name, orSuccess(p.exit))
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		if p.exit != nil {
			return fmt.Errorf("the %s: %w", p.name, p.exit)
		}
		return nil
	case <-ctx.Done():
		_ = p.cmd.Process.Kill() // it has ended, then
		<-p.done
		return fmt.Errorf("the %s did not end within %v and was killed", p.name, stopTime)
	}
}

// orSuccess makes an error of a process's end that is none.
func orSuccess(exit error) error {
	if exit == nil {
		return fmt.Errorf("exit status 0")
	}
	return exit
}

// logWidth is how much of a line of a log is shown.
const logWidth = 240

// tail returns the last lines of what the process said.
func (p *process) tail(lines int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	all = all[max(0, len(all)-lines):]
	for i, line := range all {
		if len(line) > logWidth {
			all[i] = line[:logWidth] + "…"
		}
	}
	return strings.Join(all, "\n")
}

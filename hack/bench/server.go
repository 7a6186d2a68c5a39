package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
)

// serverProcess is a program that serves a disk.
type serverProcess struct {
	cmd  *exec.Cmd
	line string // the first that it has printed, of a pass-through
}

// startServer starts one, and reads the first line of a pass-through's output. It ends by stop alone: whoever is interrupted
// stops using the disk first.
func startServer(program string, args ...string) (*serverProcess, error) {
	p := &serverProcess{cmd: exec.Command(program, args...)} //nolint:noctx // see above
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt is for the bench
	if args[0] != "-pass-through" {
		return p, p.cmd.Start()
	}
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=16") // as a worker has it
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if p.line, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("pass-through: %w", err)
	}
	p.line = strings.TrimSpace(p.line)
	return p, nil
}

func (p *serverProcess) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	_ = p.cmd.Wait() // how a signal ends it is its own affair
	return nil
}

// passThrough serves a raw file with our server until ctx ends: what an image costs is what is slower than this.
func passThrough(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	d, err := blockdev.Attach(&rawDisk{File: f, size: st.Size(), fd: int(f.Fd())}, blockdev.Options{Name: "csi-qcow2-bench"})
	if err != nil {
		return err
	}
	fmt.Println(d.Path())
	<-ctx.Done()
	return d.Detach()
}

// rawDisk is a file as a backend.
type rawDisk struct {
	*os.File
	size int64
	fd   int
}

func (d *rawDisk) Size() int64             { return d.size }
func (d *rawDisk) Flush() error            { return unix.Fdatasync(d.fd) }
func (d *rawDisk) DirectFile() (int, bool) { return d.fd, true }
func (d *rawDisk) EndDirect(int, bool)     {}
func (d *rawDisk) StartDirect(_ int, off, _ int64, _ bool) (int64, bool) {
	return off, true
}

func (d *rawDisk) WriteZeroes(off, n int64) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *rawDisk) Discard(off, n int64) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

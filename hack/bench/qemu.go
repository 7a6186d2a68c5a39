package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// daemon is a qemu-storage-daemon that serves an image as a file.
type daemon struct {
	cmd   *exec.Cmd
	conn  net.Conn
	r     *bufio.Reader
	f     *os.File
	paths []string
}

// serveQEMU starts a daemon, which is stopped by close.
func (b *bench) serveQEMU(ctx context.Context, image string) (*served, error) {
	socket, export := filepath.Join(b.dir, "qmp"), filepath.Join(b.dir, "export")
	if err := os.WriteFile(export, nil, 0o600); err != nil {
		return nil, err
	}
	d := &daemon{paths: []string{socket, export}}
	d.cmd = exec.Command("qemu-storage-daemon", //nolint:noctx // it ends by stop alone, after who uses the disk
		"--chardev", "socket,id=qmp,path="+socket+",server=on,wait=off", "--monitor", "chardev=qmp",
		"--blockdev", "driver=file,node-name=file,discard=unmap,filename="+image,
		"--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
		"--export", "type=fuse,id=export,node-name=disk,writable=on,mountpoint="+export)
	d.cmd.Stderr = os.Stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	if err := d.connect(ctx, socket, export); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return &served{
		target: d,
		create: func() error { return d.execute("blockdev-snapshot-internal-sync") },
		remove: func() error { return d.execute("blockdev-snapshot-delete-internal-sync") },
		close:  d.stop,
	}, nil
}

// connect waits until the daemon answers and its export is there.
func (d *daemon) connect(ctx context.Context, socket, export string) error {
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for d.conn == nil {
		conn, err := (&net.Dialer{}).DialContext(wait, "unix", socket)
		if wait.Err() != nil {
			return fmt.Errorf("qemu-storage-daemon: %w", err)
		}
		if err != nil {
			<-time.After(10 * time.Millisecond)
			continue
		}
		d.conn, d.r = conn, bufio.NewReader(conn)
	}
	if _, err := d.r.ReadString('\n'); err != nil { // the greeting
		return err
	}
	if err := d.command(map[string]any{"execute": "qmp_capabilities"}); err != nil {
		return err
	}
	for {
		st, err := os.Stat(export)
		if err == nil && st.Size() > 0 {
			break
		}
		if wait.Err() != nil {
			return fmt.Errorf("qemu-storage-daemon has no export: %w", wait.Err())
		}
		<-time.After(10 * time.Millisecond)
	}
	f, err := os.OpenFile(export, os.O_RDWR|unix.O_DIRECT, 0)
	d.f = f
	return err
}

func (d *daemon) execute(name string) error {
	return d.command(map[string]any{"execute": name, "arguments": map[string]any{"device": "disk", "name": "online"}})
}

func (d *daemon) command(c map[string]any) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if _, err := d.conn.Write(append(b, '\n')); err != nil {
		return err
	}
	for {
		line, err := d.r.ReadBytes('\n')
		if err != nil {
			return err
		}
		var answer struct {
			Return any             `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return err
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("%s: %s", c["execute"], answer.Error)
		case answer.Return != nil:
			return nil
		}
	}
}

func (d *daemon) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *daemon) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }
func (d *daemon) Flush() error                             { return unix.Fdatasync(int(d.f.Fd())) }

func (d *daemon) stop() error {
	var err error
	if d.f != nil {
		err = d.f.Close()
	}
	if d.conn != nil {
		err = errors.Join(err, d.conn.Close())
	}
	if e := d.cmd.Process.Signal(syscall.SIGTERM); e != nil {
		err = errors.Join(err, e)
	}
	var exit *exec.ExitError
	if e := d.cmd.Wait(); e != nil && !errors.As(e, &exit) {
		err = errors.Join(err, e)
	}
	for _, path := range d.paths {
		if e := os.Remove(path); e != nil && !os.IsNotExist(e) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// alignedBlock returns a block that O_DIRECT takes.
func alignedBlock() []byte { return alignedBytes(guestBlock) }

// alignedBytes returns n bytes, no zeros, that O_DIRECT takes.
func alignedBytes(n int64) []byte {
	b := make([]byte, n+guestBlock)
	at := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % guestBlock
	b = b[at : int64(at)+n]
	for i := range b {
		b[i] = byte(i) | 1
	}
	return b
}

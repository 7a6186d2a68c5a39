package helper

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
)

const (
	fiFreeze = 0xC0045877 // FIFREEZE, _IOWR('X', 119, int)
	fiThaw   = 0xC0045878 // FITHAW, _IOWR('X', 120, int)
)

// Run is the body of a helper process, which an engine starts to do what may have to wait for a volume. When it returns
// nil, it leaves nothing frozen.
func Run() error {
	// It ends with its engine, and then thaws first.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	conn, err := net.FileConn(os.Stdin)
	if err != nil {
		return fmt.Errorf("inherited connection to the engine: %w", err)
	}
	os.Stdin.Close()
	var p process
	b := make([]byte, maxMessage)
	for {
		n, err := conn.Read(b)
		if err != nil { // the engine is gone or has no more to ask, or the time is over
			return p.end()
		}
		var r Request
		var reply Reply
		if err = json.Unmarshal(b[:n], &r); err == nil {
			reply, err = p.do(r)
			if r.Limit > 0 {
				err = errors.Join(err, conn.SetReadDeadline(time.Now().Add(r.Limit)))
			}
		}
		if err != nil {
			reply.Error, reply.InUse = err.Error(), errors.Is(err, rpc.ErrInUse)
		}
		answer, err := json.Marshal(reply)
		if err == nil {
			_, err = conn.Write(answer)
		}
		if err != nil {
			return errors.Join(err, p.end())
		}
	}
}

type process struct {
	frozen bool // by this process
	dir    int  // 0: not open yet
}

func (p *process) do(r Request) (reply Reply, err error) {
	switch r.Op {
	case Sync:
		return reply, p.sync(r.Device)
	case Freeze:
		return p.freeze()
	case Thaw:
		return reply, p.thaw()
	case ThawDevice:
		return reply, thawDevice(r.Device, r.Surely)
	case Clear:
		return reply, clearNamed(r.Device)
	case Restore:
		return reply, blockdev.Restore(DirFD, []byte(r.Device))
	}
	return reply, fmt.Errorf("unknown operation %q", r.Op)
}

func (p *process) sync(device string) (err error) {
	if err := checkOn(device, DirFD); err != nil {
		return err
	}
	// What was passed may be no more than a path (O_PATH).
	if p.dir, err = unix.Openat(DirFD, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open the directory: %w", err)
	}
	if err := unix.Syncfs(p.dir); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

func (p *process) freeze() (reply Reply, err error) {
	switch err := unix.IoctlSetInt(p.dir, fiFreeze, 0); {
	case errors.Is(err, unix.EBUSY):
		reply.Foreign = true
	case err != nil:
		return reply, fmt.Errorf("freeze: %w", err)
	default:
		p.frozen = true
	}
	return reply, nil
}

// errThawed is the answer to Thaw when nothing was frozen any more.
var errThawed = errors.New("somebody thawed it before the snapshot")

// end leaves nothing frozen.
func (p *process) end() error {
	if err := p.thaw(); !errors.Is(err, errThawed) {
		return err
	}
	return nil
}

// thaw ends this process's freeze, if there is one.
func (p *process) thaw() error {
	if !p.frozen {
		return nil
	}
	switch err := unix.IoctlSetInt(p.dir, fiThaw, 0); {
	case errors.Is(err, unix.EINVAL):
		p.frozen = false
		return errThawed
	case err != nil:
		return fmt.Errorf("thaw: %w", err)
	}
	p.frozen = false
	return nil
}

// checkOn makes sure that an open directory lies on the file system of a device, of a type that can be frozen: a freeze of any
// other one, the node's root perhaps, would be a disaster.
func checkOn(device string, dir int) error {
	var onDisk, block unix.Stat_t
	if err := unix.Fstat(dir, &onDisk); err != nil {
		return err
	}
	if err := unix.Stat(device, &block); err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	if onDisk.Dev != block.Rdev {
		return fmt.Errorf("the directory is not on %s", device)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(dir, &fs); err != nil {
		return err
	}
	if fs.Type != unix.EXT4_SUPER_MAGIC && fs.Type != unix.XFS_SUPER_MAGIC {
		return fmt.Errorf("the file system on %s is neither ext4 nor xfs", device)
	}
	return nil
}

package blockdev

import (
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/detached"
)

// connection is a FUSE connection whose file system is mounted in no namespace at all, and so
// visible to nobody: its one file is opened through the detached mount.
type connection struct {
	dev   int    // /dev/fuse: requests come out of it, replies go into it
	mount int    // root of the detached mount
	file  int    // the served file, -1 before open
	id    uint32 // the connection's number in fusectl, ours until close

	payload int  // the most data that one request carries
	resends bool // the kernel can be asked for unanswered requests

	mu     sync.Mutex // guards closed, and id against being somebody else's
	closed bool
}

// connect makes a connection and negotiates it. Its requests carry at most payload bytes of data.
func connect(payload int) (*connection, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	dev = closeFirst(dev)
	mount, err := detached.Mount("fuse", map[string]string{
		"source":   "csi-qcow2",
		"fd":       strconv.Itoa(dev),
		"rootmode": strconv.FormatUint(unix.S_IFDIR, 8),
		"user_id":  "0",
		"group_id": "0",
		"max_read": strconv.Itoa(payload),
	}, "allow_other")
	if err != nil {
		unix.Close(dev)
		return nil, err
	}
	c := &connection{dev: dev, mount: mount, file: -1, payload: payload}
	if err := c.identify(); err != nil {
		c.close()
		return nil, err
	}
	if err := c.negotiate(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// closeFirst gives a descriptor a high number, if there is one: at the end of a process the kernel closes files from the highest
// number down. The last close of a block device writes what is in its page cache; by then the connection must have ended, or
// that waits for ever, and the process with it.
func closeFirst(fd int) int {
	const high = 512
	moved, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, high)
	if err != nil {
		return fd
	}
	unix.Close(fd)
	return moved
}

// identify finds the connection's number, which is that of the file system's device, without a
// request to the server: none is running yet.
func (c *connection) identify() error {
	var st unix.Statx_t
	if err := unix.Statx(c.mount, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return fmt.Errorf("stat FUSE mount: %w", err)
	}
	c.id = st.Dev_minor
	return nil
}

// negotiate answers INIT, the first request of a connection.
func (c *connection) negotiate() error {
	m := make(message, unix.Getpagesize()+smallPayload)
	r, err := c.receive(m)
	if err != nil {
		return fmt.Errorf("read FUSE INIT: %w", err)
	}
	if !r.valid() || r.opcode() != opInit {
		return errors.New("first FUSE request is not INIT")
	}
	major, minor, readAhead, flags, more := r.init()
	if major != protocolMajor || minor < minKernel {
		return fmt.Errorf("kernel speaks FUSE %d.%d, need %d.%d or newer", major, minor, protocolMajor, minKernel)
	}
	const need = flagAsyncDIO | flagMaxPages | flagBigWrites
	if flags&need != need {
		return fmt.Errorf("kernel's FUSE flags %#x lack some of %#x (asynchronous direct I/O, large requests)", flags, need)
	}
	c.resends = flags&flagInitExt != 0 && more&flagHasResend != 0
	putInitOut(m.payload(initOutSize), readAhead, need|flags&flagAsyncRead, c.payload)
	if err := c.send(m.conclude(initOutSize, 0)); err != nil {
		return fmt.Errorf("answer FUSE INIT: %w", err)
	}
	return nil
}

// open opens the served file. A server must be running.
func (c *connection) open(name string) error {
	file, err := unix.Openat(c.mount, name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open FUSE file: %w", err)
	}
	c.file = file
	return nil
}

// receive waits for the next request and reads it into m. ENODEV: the connection has ended.
func (c *connection) receive(m message) (request, error) {
	for {
		n, err := unix.Read(c.dev, m.request())
		switch err {
		case nil:
			return request(m.request()[:n]), nil
		case unix.EINTR, unix.EAGAIN:
		case unix.ENOENT: // the request was withdrawn
			m.clear()
		default:
			return nil, err
		}
	}
}

// send sends a reply.
func (c *connection) send(reply []byte) error {
	for {
		_, err := unix.Write(c.dev, reply)
		switch err {
		case nil, unix.ENOENT, unix.ENODEV, unix.ENOTCONN: // an error: nobody waits for it any more
			return nil
		case unix.EINTR, unix.EAGAIN:
		default:
			return err
		}
	}
}

// abort ends the connection: all requests that wait and all later ones fail, the server's threads end.
// It is a no-op when the connection is closed.
func (c *connection) abort() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	ctl, err := detached.Mount("fusectl", nil)
	if err != nil {
		return err
	}
	defer unix.Close(ctl)
	fd, err := unix.Openat(ctl, fmt.Sprintf("%d/abort", c.id), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open abort file of FUSE connection %d: %w", c.id, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("1")); err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", c.id, err)
	}
	return nil
}

// close gives up all descriptors; with them the file system goes. No server may be running.
func (c *connection) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	unix.Close(c.dev)
	unix.Close(c.mount)
	if c.file >= 0 {
		unix.Close(c.file)
	}
}

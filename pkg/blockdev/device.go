package blockdev

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Device is an attached block device. Its methods may be called concurrently.
type Device struct {
	conn    *connection
	server  *server
	backend Backend
	options Options // with defaults filled in

	mu       sync.Mutex // guards what follows, and serialises what changes the loop device
	loop     loopDevice // its number and file do not change
	kept     bool       // also by others, see Options.Keep
	aborted  bool
	released bool // the loop device is no longer bound to our file

	closing sync.Once // the end of Detach
}

// Attach serves b as a block device until Detach. It fails where the kernel cannot do direct I/O on it.
func Attach(b Backend, o Options) (*Device, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if size := b.Size(); size < 0 || size%int64(o.LogicalBlockSize) != 0 {
		return nil, fmt.Errorf("attach %s: size %d is not a multiple of the logical block size %d", o.Name, size, o.LogicalBlockSize)
	}
	c, err := connect(payload(direct(b)))
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", o.Name, err)
	}
	c.resends = c.resends && !o.Journal
	ms, err := newMessages(!c.resends)
	if err != nil {
		c.close()
		return nil, fmt.Errorf("attach %s: %w", o.Name, err)
	}
	s := newServer(b, o, ms)
	if err := s.start(c); err != nil {
		c.close()
		s.close()
		return nil, fmt.Errorf("attach %s: %w", o.Name, err)
	}
	d := &Device{conn: c, server: s, backend: b, options: o}
	if err := d.bind(o); err != nil {
		return nil, fmt.Errorf("attach %s: %w", o.Name, errors.Join(err, d.end()))
	}
	return d, nil
}

// bind puts the loop device on the served file.
func (d *Device) bind(o Options) error {
	if err := d.conn.open(o.Name); err != nil {
		return err
	}
	l, err := bindLoop(d.conn.file, o)
	if err != nil {
		return err
	}
	d.loop = l
	if err = d.loop.verify(o.Name, d.backend.Size()); err == nil && o.Keep != nil {
		err = o.Keep(l.fd)
		d.kept = true
	}
	if err != nil {
		return errors.Join(err, d.release())
	}
	return nil
}

// Path returns the device's path, /dev/loopN.
func (d *Device) Path() string { return loopPath(d.loop.number) }

// File returns the identity of the served file, by which LOOP_GET_STATUS64 tells what a loop device is bound to.
func (d *Device) File() (dev, inode uint64) { return d.loop.fileDev, d.loop.fileInode }

// Waiting returns how many requests the server has in hand. (What the kernel counts as in flight has no flushes.)
func (d *Device) Waiting() int { return int(d.server.waiting.Load()) }

// Resize tells the kernel that the backend's size has changed. The device works meanwhile, and must be able
// to: the kernel asks the server, which has no thread to answer when the backend blocks them all.
func (d *Device) Resize() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.released {
		return fmt.Errorf("resize %s: %w", d.Path(), errUnbound)
	}
	size := d.backend.Size()
	// Not by asking for the attributes: the kernel throws away an answer that crosses a finished write. The server
	// changes nothing at SETATTR, it answers with the backend's size, and the kernel takes that.
	if err := unix.Ftruncate(d.conn.file, size); err != nil {
		return fmt.Errorf("resize %s: %w", d.Path(), err)
	}
	if err := d.loop.setCapacity(size); err != nil {
		return fmt.Errorf("resize %s: %w", d.Path(), err)
	}
	return nil
}

// Detach removes the device: when it returns nil the kernel has let go of it, every request has been
// answered, and the backend is no longer called. The device's page cache has been written to the
// backend; flushing that is up to the caller.
//
// While something has the device open it returns ErrBusy, after having waited for a fraction of a second
// unless it is a file system, and the device goes on working. (If somebody mounts it at that very moment,
// it may go at its last close: then the next Detach ends what is left.)
//
// Detach after Detach, and after Abort, is allowed and frees what is left.
func (d *Device) Detach() error {
	if err := d.release(); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return d.end()
}

// release unbinds the loop device if nobody else has it open, ErrBusy otherwise.
//
// LOOP_CLR_FD cannot say which of the two it did, and drops what is still in the page cache when its caller is
// the last user. So: mark the device to be unbound at its last close, close what keeps it, everywhere, see if that was the last
// one, and if not, keep it again and take the mark away.
func (d *Device) release() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.released {
		return nil
	}
	err := d.loop.markAutoclear()
	if err != nil && !errors.Is(err, errUnbound) {
		return err
	}
	d.letGo()
	if err == nil && !waitUntil(d.loop.gone) {
		if err := d.takeBack(); !errors.Is(err, errUnbound) {
			return errors.Join(fmt.Errorf("%s: %w", d.Path(), ErrBusy), err)
		}
	}
	d.released = true
	return nil
}

// takeBack keeps a device that could not be released. One whose connection has ended goes at its last close.
func (d *Device) takeBack() error {
	if d.aborted {
		return nil
	}
	if err := d.loop.keep(); err != nil {
		return err
	}
	d.keepElsewhere()
	return d.loop.unmarkAutoclear()
}

// letGo closes what keeps the loop device bound, here and elsewhere.
func (d *Device) letGo() {
	if d.options.Keep != nil {
		if err := d.options.Keep(-1); err != nil { // if it is kept nevertheless that is seen
			klog.ErrorS(err, "The device may still be kept", "device", d.Path())
		}
		d.kept = false
	}
	d.loop.close()
}

// end ends the connection and the server.
func (d *Device) end() error {
	if err := d.conn.abort(); err != nil {
		return err
	}
	<-d.server.done
	d.closing.Do(func() {
		d.conn.close()
		d.server.close()
	})
	return nil
}

// Abort ends the FUSE connection: whoever uses the device gets I/O errors from now on. The loop
// device goes when its last user closes it. Abort does not wait for a call of the backend that is
// under way: Done says when that is over. Detach is still to be called to free what is left.
func (d *Device) Abort() error {
	if err := d.conn.abort(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.released {
		return nil
	}
	d.aborted = true
	d.letGo()
	return d.loop.clear()
}

// Done is closed when the connection has ended, for whatever reason, and the backend is no longer called.
func (d *Device) Done() <-chan struct{} { return d.server.done }

func (o Options) withDefaults() (Options, error) {
	if o.LogicalBlockSize == 0 {
		o.LogicalBlockSize = 512
	}
	if o.DiscardGranularity == 0 {
		o.DiscardGranularity = 4096
	}
	switch {
	case o.Name == "", len(o.Name) > 63, o.Name == ".", o.Name == "..", strings.ContainsAny(o.Name, "/\x00"):
		return o, fmt.Errorf("device name %q is not a file name of 1 to 63 bytes", o.Name)
	case !powerOfTwo(o.LogicalBlockSize) || o.LogicalBlockSize < 512 || o.LogicalBlockSize > unix.Getpagesize():
		return o, fmt.Errorf("logical block size %d is not a power of two from 512 to the page size", o.LogicalBlockSize)
	case !powerOfTwo(o.DiscardGranularity) || o.DiscardGranularity > 1<<30:
		return o, fmt.Errorf("discard granularity %d is not a power of two", o.DiscardGranularity)
	}
	o.DiscardGranularity = max(o.DiscardGranularity, o.LogicalBlockSize)
	return o, nil
}

func powerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }

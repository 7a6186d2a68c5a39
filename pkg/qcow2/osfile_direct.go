package qcow2

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DirectBlock is what offset, length and memory of direct I/O are multiples of, in bytes.
const DirectBlock = 512

// directFile is an osFile past the page cache. All of its I/O is: what is written through the page cache and past it in turn
// is not kept together by the kernel where both touch one folio. What is not aligned goes through a buffer.
type directFile struct {
	*osFile
	fd int

	inHand     atomic.Int32 // reads and writes, also those that others do with fd
	submitters submitters
	buffers    sync.Pool  // of *[]byte, aligned, of bounceSize
	blocks     sync.Mutex // held by whoever changes a part of a block
}

// bounceSize is the most that goes through a buffer at once.
const bounceSize = 256 << 10

// OpenDirectFile is OpenFile for writing, past the page cache if the file system can do that in blocks of DirectBlock.
func OpenDirectFile(path string) (File, error) {
	f, err := OpenFile(path, false)
	if err != nil {
		return nil, err
	}
	o := f.(*osFile)
	d := &directFile{osFile: o, buffers: sync.Pool{New: func() any {
		b := alignedBuffer(bounceSize)
		return &b
	}}}
	if err := o.control(d.goDirect); err != nil {
		return f, nil //nolint:nilerr // it goes on as it is
	}
	return d, nil
}

// goDirect changes the descriptor, which has the locks.
func (d *directFile) goDirect(fd int) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err != nil {
		return err
	}
	if st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_offset_align == 0 || st.Dio_offset_align > DirectBlock || st.Dio_mem_align > DirectBlock {
		return unix.EINVAL
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT)
	}
	d.fd = fd
	return err
}

func alignedBuffer(n int) []byte {
	b := make([]byte, n+DirectBlock)
	return b[-uintptr(unsafe.Pointer(unsafe.SliceData(b)))&(DirectBlock-1):][:n]
}

func isAligned(p []byte, off int64) bool {
	return (uintptr(unsafe.Pointer(unsafe.SliceData(p)))|uintptr(len(p))|uintptr(off))&(DirectBlock-1) == 0
}

func (d *directFile) ReadAt(p []byte, off int64) (int, error) {
	d.inHand.Add(1)
	defer d.inHand.Add(-1)
	if isAligned(p, off) {
		return d.osFile.ReadAt(p, off)
	}
	buf := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(buf)
	done := 0
	for done < len(p) {
		head := int((off + int64(done)) & (DirectBlock - 1))
		want := min(len(p)-done, bounceSize-head)
		b := (*buf)[:(head+want+DirectBlock-1)&^(DirectBlock-1)]
		n, err := d.osFile.ReadAt(b, off+int64(done-head))
		got := min(max(n-head, 0), want)
		copy(p[done:], b[head:head+got])
		done += got
		if got < want {
			return done, err
		}
		if err != nil && !errors.Is(err, io.EOF) { // behind what is wanted
			return done, err
		}
	}
	return done, nil
}

func (d *directFile) WriteAt(p []byte, off int64) (int, error) {
	if isAligned(p, off) {
		return d.writeAligned(p, off)
	}
	buf := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(buf)
	done := 0
	for done < len(p) {
		head := int((off + int64(done)) & (DirectBlock - 1))
		n := min(len(p)-done, bounceSize-head)
		if err := d.writeBounced((*buf)[:(head+n+DirectBlock-1)&^(DirectBlock-1)], p[done:done+n], head, off+int64(done-head)); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// writeBounced writes p, which begins head bytes into b, with what the file holds before and behind it in its blocks.
func (d *directFile) writeBounced(b, p []byte, head int, at int64) error {
	tail := head + len(p)
	if head != 0 || tail != len(b) {
		d.blocks.Lock()
		defer d.blocks.Unlock()
		last := b[len(b)-DirectBlock:]
		if err := d.readBlock(b[:DirectBlock], at); err != nil {
			return err
		}
		if len(b) > DirectBlock {
			if err := d.readBlock(last, at+int64(len(b)-DirectBlock)); err != nil {
				return err
			}
		}
	}
	copy(b[head:], p)
	_, err := d.writeAligned(b, at)
	return err
}

// writeAligned submits a write that is not alone. What does not go that way is written, or fails, the usual way.
func (d *directFile) writeAligned(p []byte, off int64) (n int, err error) {
	alone := d.inHand.Add(1) == 1
	defer d.inHand.Add(-1)
	if !alone {
		if n = d.submit(p, off); n == len(p) {
			return n, nil
		}
	}
	rest, err := d.osFile.WriteAt(p[n:], off+int64(n))
	return n + rest, err
}

// submit writes p, and returns how much of it was written.
func (d *directFile) submit(p []byte, off int64) (n int) {
	w := d.submitters.get()
	if w == nil {
		return 0
	}
	defer d.submitters.put(w)
	_ = d.control(func(fd int) error {
		n = w.write(fd, p, off)
		return nil
	})
	return n
}

func (d *directFile) Close() error {
	d.submitters.close()
	return d.osFile.Close()
}

// readBlock fills b; behind the end of the file are zeros.
func (d *directFile) readBlock(b []byte, at int64) error {
	n, err := d.osFile.ReadAt(b, at)
	clear(b[n:])
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

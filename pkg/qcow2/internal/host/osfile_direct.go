package host

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
	"golang.org/x/sys/unix"
)

// maxDirectBlock is the largest block of direct I/O that there is a buffer for, in bytes.
const maxDirectBlock = 4096

// DirectFile is an osFile past the page cache. All of its I/O is: what is written through the page cache and past it in turn
// is not kept together by the kernel where both touch one folio. What is not aligned goes through a buffer.
type DirectFile struct {
	*osFile
	fd    int
	Block int64 // what offset, length and memory of direct I/O are multiples of, in bytes

	inHand     atomic.Int32 // reads and writes, also those that others do with fd
	submitters submitters
	buffers    sync.Pool                               // of *[]byte, aligned, of bounceSize
	partial    [partialBlocks]lock.Mutex[lock.Partial] // by block: held by whoever changes a part of it
}

// partialBlocks is how many blocks, at best, are changed in part at the same time.
const partialBlocks = 64

// bounceSize is the most that goes through a buffer at once.
const bounceSize = 256 << 10

// OpenDirectFile is OpenFile for writing, past the page cache if the file system says how: in blocks of 512 bytes, or of 4 KiB on
// a disk with such sectors, or where XFS shares the file's blocks with another. Writes of parts of a block do not mix with others
// of that block, unless these are parts, too.
func OpenDirectFile(path string) (File, error) {
	f, err := OpenFile(path, false)
	if err != nil {
		return nil, err
	}
	o := f.(*osFile)
	d := &DirectFile{osFile: o, buffers: sync.Pool{New: func() any {
		b := AlignedBuffer(bounceSize)
		return &b
	}}}
	if err := o.control(d.goDirect); err != nil {
		return f, nil //nolint:nilerr // it goes on as it is
	}
	return d, nil
}

var _ DirectIO = (*DirectFile)(nil)

// BlockSize implements DirectIO.
func (d *DirectFile) BlockSize() int64 { return d.Block }

// FD implements DirectIO.
func (d *DirectFile) FD() int { return d.fd }

// InHand implements DirectIO.
func (d *DirectFile) InHand(change int32) { d.inHand.Add(change) }

// goDirect changes the descriptor, which has the locks.
func (d *DirectFile) goDirect(fd int) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err != nil {
		return err
	}
	if st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_offset_align == 0 {
		return unix.EINVAL
	}
	if d.Block = int64(max(st.Dio_offset_align, st.Dio_mem_align, format.SectorSize)); d.Block > maxDirectBlock {
		return unix.EINVAL
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT)
	}
	d.fd = fd
	return err
}

// AlignedBuffer returns n bytes of memory at an address that any direct I/O may use.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+maxDirectBlock)
	return b[-uintptr(unsafe.Pointer(unsafe.SliceData(b)))&(maxDirectBlock-1):][:n]
}

func (d *DirectFile) isAligned(p []byte, off int64) bool {
	return (int64(uintptr(unsafe.Pointer(unsafe.SliceData(p))))|int64(len(p))|off)&(d.Block-1) == 0
}

// ReadAt implements File.
func (d *DirectFile) ReadAt(p []byte, off int64) (int, error) {
	d.inHand.Add(1)
	defer d.inHand.Add(-1)
	if d.isAligned(p, off) {
		return d.osFile.ReadAt(p, off)
	}
	buf := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(buf)
	done := 0
	for done < len(p) {
		head := int((off + int64(done)) & (d.Block - 1))
		want := min(len(p)-done, bounceSize-head)
		b := (*buf)[:d.roundUp(head+want)]
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

// WriteAt implements File.
func (d *DirectFile) WriteAt(p []byte, off int64) (int, error) {
	if d.isAligned(p, off) {
		return d.writeAligned(p, off)
	}
	buf := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(buf)
	done := 0
	for done < len(p) {
		head := int((off + int64(done)) & (d.Block - 1))
		n := min(len(p)-done, bounceSize-head)
		if err := d.writeBounced((*buf)[:d.roundUp(head+n)], p[done:done+n], head, off+int64(done-head)); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (d *DirectFile) roundUp(n int) int { return int((int64(n) + d.Block - 1) &^ (d.Block - 1)) }

// writeBounced writes p, which begins head bytes into b, with what the file holds before and behind it in its blocks.
func (d *DirectFile) writeBounced(b, p []byte, head int, at int64) error {
	tail := head + len(p)
	if head != 0 || tail != len(b) {
		lastAt := at + int64(len(b)) - d.Block
		defer d.lockPartial(at, lastAt)()
		if err := d.readBlock(b[:d.Block], at); err != nil {
			return err
		}
		if lastAt != at {
			if err := d.readBlock(b[lastAt-at:], lastAt); err != nil {
				return err
			}
		}
	}
	copy(b[head:], p)
	_, err := d.writeAligned(b, at)
	return err
}

// lockPartial keeps others from changing parts of the blocks at two offsets.
func (d *DirectFile) lockPartial(first, last int64) (unlock func()) {
	i, k := first/d.Block%partialBlocks, last/d.Block%partialBlocks
	i, k = min(i, k), max(i, k)
	d.partial[i].Lock()
	if i == k {
		return d.partial[i].Unlock
	}
	d.partial[k].Lock()
	return func() {
		d.partial[k].Unlock()
		d.partial[i].Unlock()
	}
}

// writeAligned submits a write that is not alone. What does not go that way is written, or fails, the usual way.
func (d *DirectFile) writeAligned(p []byte, off int64) (n int, err error) {
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
func (d *DirectFile) submit(p []byte, off int64) (n int) {
	w := d.submitters.get()
	if w == nil {
		return 0
	}
	_ = d.control(func(fd int) error {
		n = w.write(fd, p, off)
		return nil
	})
	d.submitters.put(w)
	return n
}

// Close implements File.
func (d *DirectFile) Close() error {
	d.submitters.close()
	return d.osFile.Close()
}

// readBlock fills b; behind the end of the file are zeros.
func (d *DirectFile) readBlock(b []byte, at int64) error {
	n, err := d.osFile.ReadAt(b, at)
	clear(b[n:])
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

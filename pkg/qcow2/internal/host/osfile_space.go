package host

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ZeroChunk is how many bytes of zeros are written at once where holes cannot be punched.
const ZeroChunk = 1 << 20

// PunchHole writes zeros where the file system knows no holes.
func (o *osFile) PunchHole(off, n int64) error {
	switch {
	case o.readOnly:
		return o.refuse("punch hole")
	case off < 0 || n < 0:
		return fmt.Errorf("punch hole in %s at offset %d, %d bytes: %w", o.Name(), off, n, ErrOutOfRange)
	case n == 0:
		return nil
	}
	err := o.op("punch hole", func(fd int) error {
		// Before it takes the lock that others' writes wait for, the file system need not write anything any more.
		const written = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		_ = unix.SyncFileRange(fd, off, n, written)
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if errors.Is(err, errors.ErrUnsupported) {
		return o.writeZeros(off, n)
	}
	return at(err, off)
}

// writeZeros writes zeros over n bytes at off, as far as the file reaches.
func (o *osFile) writeZeros(off, n int64) error {
	size, err := o.Size()
	if err != nil {
		return err
	}
	end := min(off+n, size)
	if off+n < off { // more than an int64: to the end of the file
		end = size
	}
	zeros := make([]byte, max(0, min(end-off, ZeroChunk)))
	for off < end {
		chunk := zeros[:min(end-off, ZeroChunk)]
		if _, err := o.WriteAt(chunk, off); err != nil {
			return err
		}
		off += int64(len(chunk))
	}
	return nil
}

var _ Allocator = (*osFile)(nil)

func (o *osFile) Allocate(off, n int64) error {
	switch {
	case o.readOnly:
		return o.refuse("allocate")
	case off < 0 || n < 0:
		return fmt.Errorf("allocate in %s at offset %d, %d bytes: %w", o.Name(), off, n, ErrOutOfRange)
	case n == 0:
		return nil
	}
	return at(o.op("allocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n)
	}), off)
}

var _ RangeCloner = (*osFile)(nil)

func (o *osFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	if d, ok := src.(*DirectFile); ok {
		src = d.osFile
	}
	from, ok := src.(*osFile)
	switch {
	case o.readOnly:
		return o.refuse("clone range")
	case !ok:
		return fmt.Errorf("clone range from %s: %w", src.Name(), errors.ErrUnsupported)
	case srcOff < 0 || dstOff < 0 || n < 0:
		return fmt.Errorf("clone range of %s: %w", src.Name(), ErrOutOfRange)
	case n == 0: // the kernel would take it for all of the file
		return nil
	}
	err := from.control(func(srcFD int) error {
		return o.op("clone range", func(fd int) error {
			return unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
				Src_fd:      int64(srcFD),
				Src_offset:  uint64(srcOff),
				Src_length:  uint64(n),
				Dest_offset: uint64(dstOff),
			})
		})
	})
	switch {
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	default:
		return at(err, dstOff)
	}
}

var _ Settler = (*osFile)(nil)

// Settle commits all of a btrfs: a sync of the file would log each of its extents, and the syncs of all other files would
// wait for the end of that.
func (o *osFile) Settle() error {
	var st unix.Statfs_t
	if err := o.op("statfs", func(fd int) error { return unix.Fstatfs(fd, &st) }); err != nil || st.Type != unix.BTRFS_SUPER_MAGIC {
		return err
	}
	return o.op("syncfs", unix.Syncfs)
}

var _ Writebacker = (*osFile)(nil)

// StartWriteback is a hint: an error in writing is Sync's to tell.
func (o *osFile) StartWriteback(off, n int64) {
	_ = o.control(func(fd int) error { return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE) })
}

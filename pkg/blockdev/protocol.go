package blockdev

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"
)

// The part of the FUSE protocol (linux/fuse.h, version 7) that a file system of one regular file
// needs. All numbers are in the byte order of the machine; offsets are in bytes.

// Operations of the kernel's requests.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opInit        = 26
	opInterrupt   = 36
	opBatchForget = 42
	opFallocate   = 43
)

const (
	protocolMajor = 7
	protocolMinor = 38 // the newest whose structures we know; the kernel may speak a newer one
	minKernel     = 28 // the first with max_pages: 1 MiB requests

	flagAsyncRead = 1 << 0
	flagBigWrites = 1 << 5
	flagAsyncDIO  = 1 << 15
	flagMaxPages  = 1 << 22
	flagInitExt   = 1 << 30 // there is a second word of flags

	flagHasResend = 1 << (39 - 32) // of the second word

	notifyResend = 7

	openDirectIO             = 1 << 0
	openNoFlush              = 1 << 5 // no FLUSH at close(2): a dying server could not answer its own
	openParallelDirectWrites = 1 << 6

	// maxBackground bounds the asynchronous requests in flight; loop's queue holds 128, and direct
	// I/O may split one of them.
	maxBackground = 256
	// maxPayload is the most data, in bytes, that one READ or WRITE carries.
	maxPayload = 1 << 20

	rootID = 1
	fileID = 2

	// forever, in seconds: the kernel may keep what it knows of the file. Resize tells it when that
	// changes; LOOP_GET_STATUS64 must get an answer when the server is dead.
	forever = 1 << 32
)

// Sizes of structures.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
	writeInSize   = 40
	initOutSize   = 64
	entryOutSize  = 128
	attrOutSize   = 104
	openOutSize   = 16
	writeOutSize  = 8
	statfsOutSize = 80

	// headRoom is what precedes the data of a WRITE, the longest head of any message with data.
	headRoom = inHeaderSize + writeInSize
)

// request is what read(2) on /dev/fuse returned: the header, then the operation's arguments.
//
//	0 u32 length   4 u32 opcode   8 u64 unique   16 u64 nodeid   24 u32 uid   28 u32 gid   32 u32 pid
type request []byte

func (r request) opcode() uint32 { return binary.NativeEndian.Uint32(r[4:]) }
func (r request) unique() uint64 { return binary.NativeEndian.Uint64(r[8:]) }
func (r request) nodeID() uint64 { return binary.NativeEndian.Uint64(r[16:]) }
func (r request) args() []byte   { return r[inHeaderSize:] }

// valid tells if the request is whole, arguments included, so that their fields may be read.
func (r request) valid() bool {
	if len(r) < inHeaderSize || int(binary.NativeEndian.Uint32(r)) != len(r) {
		return false
	}
	switch r.opcode() {
	case opRead:
		return len(r) >= inHeaderSize+20
	case opWrite:
		return len(r) >= headRoom && len(r)-headRoom == r.ioLength()
	case opFallocate:
		return len(r) >= inHeaderSize+28
	case opInit:
		return len(r) >= inHeaderSize+16
	}
	return true
}

// wantsReply: the kernel waits for one.
func (r request) wantsReply() bool { return r.opcode() != opForget && r.opcode() != opBatchForget }

// Arguments of READ and WRITE: 0 u64 fh   8 u64 offset   16 u32 size.
func (r request) ioOffset() int64 { return int64(binary.NativeEndian.Uint64(r.args()[8:])) }
func (r request) ioLength() int   { return int(binary.NativeEndian.Uint32(r.args()[16:])) }

// Arguments of FALLOCATE: 0 u64 fh   8 u64 offset   16 u64 length   24 u32 mode.
func (r request) falloc() (off, n int64, mode uint32) {
	a := r.args()
	return int64(binary.NativeEndian.Uint64(a[8:])), int64(binary.NativeEndian.Uint64(a[16:])), binary.NativeEndian.Uint32(a[24:])
}

// Arguments of INIT: 0 u32 major   4 u32 minor   8 u32 max_readahead   12 u32 flags   16 u32 flags2, where there is one.
func (r request) init() (major, minor, readAhead, flags, more uint32) {
	a := r.args()
	if len(a) >= 20 {
		more = binary.NativeEndian.Uint32(a[16:])
	}
	return binary.NativeEndian.Uint32(a), binary.NativeEndian.Uint32(a[4:]), binary.NativeEndian.Uint32(a[8:]), binary.NativeEndian.Uint32(a[12:]), more
}

// Argument of LOOKUP: the name, ended by a zero.
func (r request) name() string { return unix.ByteSliceToString(r.args()) }

// putOutHeader writes the header of a reply: 0 u32 length   4 i32 -errno   8 u64 unique.
func putOutHeader(b []byte, length int, errno unix.Errno, unique uint64) {
	binary.NativeEndian.PutUint32(b, uint32(length))
	binary.NativeEndian.PutUint32(b[4:], uint32(-int32(errno)))
	binary.NativeEndian.PutUint64(b[8:], unique)
}

// putInitOut writes the answer to INIT: 0 u32 major   4 u32 minor   8 u32 max_readahead   12 u32 flags
// 16 u16 max_background   18 u16 congestion_threshold   20 u32 max_write   24 u32 time_gran   28 u16 max_pages.
func putInitOut(b []byte, readAhead, flags uint32, payload int) {
	clear(b[:initOutSize])
	binary.NativeEndian.PutUint32(b, protocolMajor)
	binary.NativeEndian.PutUint32(b[4:], protocolMinor)
	binary.NativeEndian.PutUint32(b[8:], readAhead)
	binary.NativeEndian.PutUint32(b[12:], flags)
	binary.NativeEndian.PutUint16(b[16:], maxBackground)
	binary.NativeEndian.PutUint16(b[18:], maxBackground)
	binary.NativeEndian.PutUint32(b[20:], uint32(payload))
	binary.NativeEndian.PutUint32(b[24:], 1)
	binary.NativeEndian.PutUint16(b[28:], uint16(payload/unix.Getpagesize()))
}

// putEntryOut writes the answer to LOOKUP: 0 u64 nodeid   8 u64 generation   16 u64 entry_valid
// 24 u64 attr_valid   40 the attributes.
func putEntryOut(b []byte, id uint64, size int64, blockSize int) {
	clear(b[:entryOutSize])
	binary.NativeEndian.PutUint64(b, id)
	binary.NativeEndian.PutUint64(b[16:], forever)
	binary.NativeEndian.PutUint64(b[24:], forever)
	putAttr(b[40:], id, size, blockSize)
}

// putAttrOut writes the answer to GETATTR and SETATTR: 0 u64 attr_valid   16 the attributes.
func putAttrOut(b []byte, id uint64, size int64, blockSize int) {
	clear(b[:attrOutSize])
	binary.NativeEndian.PutUint64(b, forever)
	putAttr(b[16:], id, size, blockSize)
}

// putAttr writes attributes into zeroed memory: 0 u64 ino   8 u64 size   16 u64 blocks   60 u32 mode
// 64 u32 nlink   80 u32 blksize.
func putAttr(b []byte, id uint64, size int64, blockSize int) {
	mode := uint32(unix.S_IFREG | 0o600)
	if id == rootID {
		mode, size = unix.S_IFDIR|0o700, 0
	}
	binary.NativeEndian.PutUint64(b, id)
	binary.NativeEndian.PutUint64(b[8:], uint64(size))
	binary.NativeEndian.PutUint64(b[16:], uint64(size/512))
	binary.NativeEndian.PutUint32(b[60:], mode)
	binary.NativeEndian.PutUint32(b[64:], 1)
	// The kernel keeps the logarithm of blksize: a power of two, or it is rounded.
	binary.NativeEndian.PutUint32(b[80:], 1<<(bits.Len(uint(blockSize))-1))
}

// putOpenOut writes the answer to OPEN: 0 u64 fh   8 u32 open_flags.
func putOpenOut(b []byte) {
	clear(b[:openOutSize])
	binary.NativeEndian.PutUint32(b[8:], openDirectIO|openNoFlush|openParallelDirectWrites)
}

// putWriteOut writes the answer to WRITE: 0 u32 size.
func putWriteOut(b []byte, n int) {
	clear(b[:writeOutSize])
	binary.NativeEndian.PutUint32(b, uint32(n))
}

// putStatfsOut writes the answer to STATFS: 0 u64 blocks   40 u32 bsize   44 u32 namelen   48 u32 frsize.
// Loop takes its discard granularity from bsize.
func putStatfsOut(b []byte, size int64, blockSize int) {
	clear(b[:statfsOutSize])
	binary.NativeEndian.PutUint64(b, uint64(size)/uint64(blockSize))
	binary.NativeEndian.PutUint32(b[40:], uint32(blockSize))
	binary.NativeEndian.PutUint32(b[44:], unix.NAME_MAX)
	binary.NativeEndian.PutUint32(b[48:], uint32(blockSize))
}

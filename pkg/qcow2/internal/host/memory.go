package host

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const hugePage = 2 << 20

// NewMemory returns n zeros, for buffers of some MiB: in huge pages where the system has them, for in a virtual machine it
// can take longer to fault small ones in than to fill them.
func NewMemory(n int64) []byte {
	b := make([]byte, n+hugePage)
	at := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % hugePage
	b = b[at : int64(at)+n : int64(at)+n]
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	return b
}

// Populate gets memory its pages now, not when it is used, which may be while others wait.
func Populate(b []byte) {
	_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE) // a hint, which kernels before 5.14 do not know
}

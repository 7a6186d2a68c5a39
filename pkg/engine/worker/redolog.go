package worker

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// redoMemory is the memory of an image's redo log, shared by all who have its descriptor.
type redoMemory struct {
	fd int
	b  []byte
}

// redoMemorySize in bytes: twice the least.
const redoMemorySize = 2 * 8 * qcow2.MinRedoLog

func newRedoMemory() (*redoMemory, error) {
	fd, err := unix.MemfdCreate("csi-qcow2 redo log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	if err := unix.Ftruncate(fd, redoMemorySize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	m, err := mapRedoMemory(fd)
	if err != nil {
		unix.Close(fd)
	}
	return m, err
}

// mapRedoMemory takes over fd when it succeeds.
func mapRedoMemory(fd int) (*redoMemory, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	if st.Size <= 0 || st.Size > 1<<30 || st.Size%8 != 0 {
		return nil, fmt.Errorf("memory of the redo log has %d bytes", st.Size)
	}
	b, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the redo log: %w", err)
	}
	return &redoMemory{fd, b}, nil
}

// log returns the log that is in the memory.
func (m *redoMemory) log() (*qcow2.RedoLog, error) {
	return qcow2.NewRedoLog(unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(m.b))), len(m.b)/8))
}

// close gives up the memory. No image may use its log.
func (m *redoMemory) close() {
	_ = unix.Munmap(m.b)
	unix.Close(m.fd)
}

package blockdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// messages is the memory of a server's messages. Only what has been used takes memory, until it is given back.
//
// A journal's has to outlive the process: it is a file in memory. All other is anonymous memory, which can be in huge pages.
//
// A request is read into a large message: its size cannot be known before. That memory must be there, because a process
// that is killed while the kernel copies a request to memory that is not fails that request, which is then lost for the
// next one. The usual, small request is then moved to a small message, so one populated large message is enough.
type messages struct {
	memory []byte
	fd     int // the file, or -1
}

const (
	smallPayload  = 32 << 10
	smallMessages = DirectRequests     // numbers 0 to smallMessages-1
	largeMessages = DirectRequests + 1 // the numbers behind: one to read into
)

// newMessages makes the memory of messages, in a file if they are a journal.
func newMessages(journal bool) (*messages, error) {
	if !journal {
		return mapMessages(-1)
	}
	fd, err := unix.MemfdCreate("csi-qcow2 requests", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory of requests: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(messageOffset(smallMessages+largeMessages))); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memory of requests: %w", err)
	}
	return mapMessages(fd)
}

// openMessages maps what another process has made; fd stays the caller's.
func openMessages(fd int) (*messages, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("memory of requests: %w", err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(own, &st); err == nil && st.Size != int64(messageOffset(smallMessages+largeMessages)) {
		err = fmt.Errorf("it has %d bytes", st.Size)
	}
	if err != nil {
		unix.Close(own)
		return nil, fmt.Errorf("memory of requests: %w", err)
	}
	return mapMessages(own)
}

// mapMessages takes over fd, or maps anonymous memory if that is -1.
func mapMessages(fd int) (*messages, error) {
	flags := unix.MAP_SHARED
	if fd < 0 {
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	}
	b, err := unix.Mmap(fd, 0, messageOffset(smallMessages+largeMessages), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("map the memory of requests: %w", err)
	}
	return &messages{b, fd}, nil
}

// messageOffset returns where a message begins.
func messageOffset(number int) int {
	page := unix.Getpagesize()
	small, large := min(number, smallMessages), max(number-smallMessages, 0)
	return small*(page+smallPayload) + large*(page+maxPayload)
}

// useHugePages asks for them: I/O of one MiB in scattered pages is more segments than a disk takes at once, and half as fast.
func (ms *messages) useHugePages() { _ = unix.Madvise(ms.memory, unix.MADV_HUGEPAGE) }

func (ms *messages) at(number int) message {
	from, to := messageOffset(number), messageOffset(number+1)
	return message(ms.memory[from:to:to])
}

// giveBack frees the memory of all messages but one. The others must be free.
func (ms *messages) giveBack(except int) {
	ms.drop(0, messageOffset(except))
	ms.drop(messageOffset(except+1), len(ms.memory))
}

// drop also works in memory that is locked. It is a hint.
func (ms *messages) drop(from, to int) {
	if ms.fd < 0 {
		_ = unix.Madvise(ms.memory[from:to], unix.MADV_DONTNEED_LOCKED)
		return
	}
	_ = unix.Fallocate(ms.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(from), int64(to-from))
}

func (ms *messages) close() {
	_ = unix.Munmap(ms.memory)
	if ms.fd >= 0 {
		unix.Close(ms.fd)
	}
}

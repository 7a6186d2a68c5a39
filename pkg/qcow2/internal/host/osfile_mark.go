package host

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

var _ Marker = (*osFile)(nil)

// markName is the extended attribute that holds a mark. It is short so that it fits into the inode.
const markName = "user.qcow2-sound"

func (o *osFile) State() (FileState, error) {
	var st unix.Statx_t
	err := o.op("statx", func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	})
	nanoseconds := func(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
	return FileState{Inode: st.Ino, Born: nanoseconds(st.Btime), Size: int64(st.Size), Written: nanoseconds(st.Mtime)}, err
}

func (o *osFile) SetWritten(t int64) error {
	times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(t)}
	return o.op("set times", func(fd int) error {
		if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
}

func (o *osFile) Mark() ([]byte, error) {
	b := make([]byte, 256) // more than any mark
	n := 0
	err := o.op("get attribute", func(fd int) (err error) {
		n, err = unix.Fgetxattr(fd, markName, b)
		return err
	})
	if errors.Is(err, unix.ENODATA) {
		return nil, nil
	}
	return b[:max(n, 0)], err
}

func (o *osFile) SetMark(mark []byte) error {
	return o.op("set attribute", func(fd int) error {
		if mark == nil {
			return unix.Fremovexattr(fd, markName)
		}
		return unix.Fsetxattr(fd, markName, mark, 0)
	})
}

func (o *osFile) Boot() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	b, err := hex.DecodeString(string(bytes.ReplaceAll(bytes.TrimSpace(id), []byte("-"), nil)))
	if err != nil {
		return ""
	}
	return string(b)
}

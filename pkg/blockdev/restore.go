package blockdev

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Whoever has a loop device open for writing may change its offset, size, name, block size and flags, and whoever can read it
// may have it unbound. What is changed is noticed by Check, and changed back.

// ErrChanged is returned by Check when the loop device is not what it was made, and cannot be made so again.
var ErrChanged = errors.New("the loop device was changed by one of its users")

// settings are what a loop device has to be, in a form that can be passed to another process.
type settings struct {
	Number    int    `json:"number"`
	FileDev   uint64 `json:"fileDev"`
	FileInode uint64 `json:"fileInode"`
	Name      string `json:"name"`
	BlockSize int    `json:"blockSize"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
}

func (d *Device) settings() settings {
	return settings{
		Number: d.loop.number, FileDev: d.loop.fileDev, FileInode: d.loop.fileInode,
		Name: d.options.Name, BlockSize: d.options.LogicalBlockSize, ReadOnly: d.options.ReadOnly,
	}
}

// Check makes sure that the device is bound to the served file, with the settings that it was attached with, is kept open, and
// will be kept when this process dies (Options.Keep). What a user of the device has changed it changes back; ErrChanged, if
// that cannot be, and ErrGone when the number is no longer ours. It may have to wait for I/O of the device's users, so whoever
// answers them must not call it. After Detach and Abort it returns nil.
func (d *Device) Check() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.released || d.aborted {
		return nil
	}
	if d.loop.fd == 0 {
		if err := d.loop.keep(); err != nil {
			return d.lost(err)
		}
	}
	if !d.kept {
		d.keepElsewhere()
	}
	want := d.settings()
	changed, err := want.compare(d.loop.fd)
	if err != nil || len(changed) == 0 {
		return d.lost(err)
	}
	klog.InfoS("Somebody has changed the loop device, changing it back", "device", d.Path(), "volume", want.Name, "changed", changed)
	b, err := json.Marshal(want)
	if err != nil {
		return err
	}
	restore := d.options.Restore
	if restore == nil {
		restore = Restore
	}
	restoreErr := restore(d.loop.fd, b)
	changed, err = want.compare(d.loop.fd)
	if err != nil {
		return d.lost(err)
	}
	// A kernel may refuse that while a file system is mounted. It does no harm as long as the device is kept open.
	delete(changed, autoclearMark)
	if len(changed) > 0 {
		return fmt.Errorf("%s: %w: %s (%w)", d.Path(), ErrChanged, changed, errors.Join(restoreErr, errStays))
	}
	return nil
}

var errStays = errors.New("it cannot be changed back")

func (d *Device) lost(err error) error {
	if errors.Is(err, errUnbound) {
		return fmt.Errorf("%s is no longer bound to the volume: %w", d.Path(), ErrGone)
	}
	return err
}

// keepElsewhere has a copy of the descriptor kept by others. It is tried again at the next Check.
func (d *Device) keepElsewhere() {
	if d.options.Keep == nil {
		return
	}
	if err := d.options.Keep(d.loop.fd); err != nil {
		klog.ErrorS(err, "Nobody would keep the device bound if this process died", "device", d.Path())
		return
	}
	d.kept = true
}

// changes are what differs from the settings, with what was found.
type changes map[string]string

const autoclearMark = "to be unbound"

func (c changes) String() string {
	var all []string
	for what, is := range c {
		all = append(all, strings.TrimSpace(what+" "+is))
	}
	return strings.Join(all, ", ")
}

// compare returns what differs on an open device. errUnbound if it is another's.
func (s settings) compare(fd int) (changes, error) {
	l := loopDevice{number: s.Number, fileDev: s.FileDev, fileInode: s.FileInode}
	info, err := l.status(fd)
	if err != nil {
		return nil, err
	}
	blockSize, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	if err != nil {
		return nil, fmt.Errorf("block size of %s: %w", loopPath(s.Number), err)
	}
	c := changes{}
	if info.Offset != 0 {
		c["offset"] = fmt.Sprint(info.Offset)
	}
	if info.Sizelimit != 0 {
		c["size limit"] = fmt.Sprint(info.Sizelimit)
	}
	if name := unix.ByteSliceToString(info.File_name[:]); name != s.Name {
		c["name"] = fmt.Sprintf("%q", name)
	}
	if blockSize != s.BlockSize {
		c["block size"] = fmt.Sprint(blockSize)
	}
	for flag, what := range map[uint32]string{unix.LO_FLAGS_AUTOCLEAR: autoclearMark, unix.LO_FLAGS_PARTSCAN: "partitions are looked for"} {
		if info.Flags&flag != 0 {
			c[what] = ""
		}
	}
	if info.Flags&unix.LO_FLAGS_DIRECT_IO == 0 {
		c["no direct I/O"] = ""
	}
	if readOnly := info.Flags&unix.LO_FLAGS_READ_ONLY != 0; readOnly != s.ReadOnly {
		c["read-only"] = fmt.Sprint(readOnly)
	}
	return c, nil
}

// Restore changes the settings of a loop device back, as Options.Restore is asked to. It waits for the I/O that the device has
// in hand, and nothing can end that wait.
func Restore(fd int, want []byte) error {
	var s settings
	if err := json.Unmarshal(want, &s); err != nil {
		return fmt.Errorf("settings of a loop device: %w", err)
	}
	changed, err := s.compare(fd)
	if err != nil {
		return err
	}
	has := func(what string) bool { _, ok := changed[what]; return ok }
	if has("offset") || has("size limit") || has("name") || has(autoclearMark) {
		info := &unix.LoopInfo64{}
		copy(info.File_name[:], s.Name)
		if err := unix.IoctlLoopSetStatus64(fd, info); err != nil {
			return fmt.Errorf("set status of %s: %w", loopPath(s.Number), err)
		}
	}
	if has("block size") {
		if err := unix.IoctlSetInt(fd, unix.LOOP_SET_BLOCK_SIZE, s.BlockSize); err != nil {
			return fmt.Errorf("set block size of %s: %w", loopPath(s.Number), err)
		}
	}
	if has("no direct I/O") {
		if err := unix.IoctlSetInt(fd, unix.LOOP_SET_DIRECT_IO, 1); err != nil {
			return fmt.Errorf("make %s do direct I/O: %w", loopPath(s.Number), err)
		}
	}
	return nil
}

package blockdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Info describes a loop device of the machine that carries a Name of ours.
type Info struct {
	Path string // /dev/loopN
	Name string
	Size int64 // bytes
}

// Find returns the loop devices whose Name begins with prefix, their servers alive or not. It changes
// nothing, and does not even open anybody else's device.
func Find(prefix string) ([]Info, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []Info
	for _, e := range entries {
		number, isLoop := loopNumber(e.Name())
		if !isLoop {
			continue
		}
		// The served file has the device's name and is in the root of its file system.
		file, err := backingFile(number)
		if err != nil {
			return nil, fmt.Errorf("find %q: %w", prefix, err)
		}
		name, ours := strings.CutPrefix(file, "/")
		if !ours || !strings.HasPrefix(name, prefix) {
			continue
		}
		info, err := describe(number, name)
		if errors.Is(err, errUnbound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find %q: %w", prefix, err)
		}
		found = append(found, info)
	}
	return found, nil
}

// describe returns a device of ours. It is errUnbound if it has another name, or is gone.
func describe(number int, name string) (Info, error) {
	fd, err := openLoop(number, unix.O_RDONLY)
	if errors.Is(err, unix.ENXIO) {
		return Info{}, errUnbound
	}
	if err != nil {
		return Info{}, err
	}
	defer unix.Close(fd)
	// A dead server's file may have lost its attributes; then the name in /sys must do.
	status, err := unix.IoctlLoopGetStatus64(fd)
	if errors.Is(err, unix.ENXIO) || err == nil && unix.ByteSliceToString(status.File_name[:]) != name {
		return Info{}, errUnbound
	}
	size, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return Info{}, fmt.Errorf("size of %s: %w", loopPath(number), err)
	}
	return Info{Path: loopPath(number), Name: name, Size: size}, nil
}

// Clear removes a loop device whose server is dead; finished when it returns nil, also if the device
// is gone already. ErrBusy while something has it open: the kernel removes it at the last close all the
// same.
func Clear(path string) error {
	number, isLoop := loopNumber(filepath.Base(path))
	if !isLoop || path != loopPath(number) {
		return fmt.Errorf("clear %s: not a loop device", path)
	}
	if err := clearLoop(number, func(int) error { return nil }); err != nil {
		return fmt.Errorf("clear: %w", err)
	}
	free := func() bool {
		file, err := backingFile(number)
		return err == nil && file == ""
	}
	if !waitUntil(free) {
		return fmt.Errorf("clear %s: %w", path, ErrBusy)
	}
	return nil
}

func loopNumber(name string) (int, bool) {
	digits, isLoop := strings.CutPrefix(name, "loop")
	number, err := strconv.Atoi(digits)
	return number, isLoop && err == nil && number >= 0
}

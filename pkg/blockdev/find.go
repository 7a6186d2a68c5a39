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
// nothing, and opens only devices whose file in /sys bears such a name.
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
		file := backingFile(number)
		if file == "" || !strings.HasPrefix(filepath.Base(file), fileName(prefix)) {
			continue
		}
		info, err := describe(number)
		if errors.Is(err, unix.ENXIO) { // gone meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(info.Name, prefix) {
			found = append(found, info)
		}
	}
	return found, nil
}

func describe(number int) (Info, error) {
	fd, err := openLoop(number, unix.O_RDONLY)
	if err != nil {
		return Info{}, err
	}
	defer unix.Close(fd)
	status, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return Info{}, fmt.Errorf("status of %s: %w", loopPath(number), err)
	}
	size, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return Info{}, fmt.Errorf("size of %s: %w", loopPath(number), err)
	}
	return Info{Path: loopPath(number), Name: unix.ByteSliceToString(status.File_name[:]), Size: size}, nil
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
	if !waitUntil(func() bool { return backingFile(number) == "" }) {
		return fmt.Errorf("clear %s: %w", path, ErrBusy)
	}
	return nil
}

func loopNumber(name string) (int, bool) {
	digits, isLoop := strings.CutPrefix(name, "loop")
	number, err := strconv.Atoi(digits)
	return number, isLoop && err == nil && number >= 0
}

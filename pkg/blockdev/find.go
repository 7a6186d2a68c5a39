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

// Bound returns the paths of the loop devices whose Name begins with prefix, by name. It looks only from outside: a device
// that nobody serves just now can make wait whoever opens it.
func Bound(prefix string) (map[string]string, error) {
	found := map[string]string{}
	err := eachBound(prefix, func(number int, name string) error {
		found[name] = loopPath(number)
		return nil
	})
	return found, err
}

// Find returns the loop devices whose Name begins with prefix, their servers alive or dead, but not about to be replaced. It
// changes nothing, and does not even open anybody else's device.
func Find(prefix string) ([]Info, error) {
	var found []Info
	err := eachBound(prefix, func(number int, name string) error {
		info, err := describe(number, name)
		if errors.Is(err, errUnbound) {
			return nil
		}
		if err == nil {
			found = append(found, info)
		}
		return err
	})
	return found, err
}

// eachBound calls fn with each loop device whose file in /sys has a name with the prefix.
func eachBound(prefix string, fn func(number int, name string) error) error {
	err := eachLoop(func(number int) error {
		// The served file has the device's name and is in the root of its file system.
		file, err := backingFile(number)
		if err == nil {
			if name, ours := strings.CutPrefix(file, "/"); ours && strings.HasPrefix(name, prefix) {
				err = fn(number, name)
			}
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("find %q: %w", prefix, err)
	}
	return nil
}

// eachLoop calls fn with the number of each loop device, bound or not.
func eachLoop(fn func(number int) error) error {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return fmt.Errorf("list block devices: %w", err)
	}
	for _, e := range entries {
		if number, isLoop := loopNumber(e.Name()); isLoop {
			if err := fn(number); err != nil {
				return err
			}
		}
	}
	return nil
}

// describe returns a device of ours. It is errUnbound if it is another's now. The name that LOOP_GET_STATUS64 tells is no
// proof: a device's users can change it.
func describe(number int, name string) (Info, error) {
	fd, err := openNamed(number, name)
	if err != nil {
		return Info{}, err
	}
	defer unix.Close(fd)
	size, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return Info{}, fmt.Errorf("size of %s: %w", loopPath(number), err)
	}
	return Info{Path: loopPath(number), Name: name, Size: size}, nil
}

// openNamed opens a loop device whose file has the name. While it is open nobody can bind it to another. errUnbound.
func openNamed(number int, name string) (int, error) {
	fd, err := openLoop(number, unix.O_RDONLY)
	if errors.Is(err, unix.ENXIO) { // being unbound right now
		return -1, errUnbound
	}
	if err != nil {
		return -1, err
	}
	file, err := backingFile(number)
	if err == nil && file != "/"+name {
		err = errUnbound
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Clear removes the loop device of a name whose server is dead; finished when it returns nil, also if the device
// is gone already, or another's by now. ErrBusy while something has it open: the kernel removes it at the last close all the
// same.
func Clear(path, name string) error {
	number, isLoop := loopNumber(filepath.Base(path))
	if !isLoop || path != loopPath(number) {
		return fmt.Errorf("clear %s: not a loop device", path)
	}
	fd, err := openNamed(number, name)
	if errors.Is(err, errUnbound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("clear: %w", err)
	}
	err = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
	unix.Close(fd)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("clear %s: %w", path, err)
	}
	free := func() bool {
		file, err := backingFile(number)
		return err == nil && file != "/"+name
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

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// inUse makes an error that names who has the image of an error of opening the image at path, if it is in use.
func inUse(path string, err error) error {
	if !errors.Is(err, qcow2.ErrInUse) {
		return err
	}
	who := "another process, which cannot be seen from here"
	if users := usersOf(path); len(users) > 0 {
		who = strings.Join(users, " and ")
	}
	return plainError{fmt.Sprintf("%s is in use by %s", printable(path), who), qcow2.ErrInUse}
}

// usersOf returns the processes that hold locks of the file at path, as in "qemu-io (PID 4711)", as far as they can be seen.
func usersOf(path string) []string {
	file, err := os.Stat(path)
	if err != nil {
		return nil
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	var users []string
	for _, process := range processes {
		if locks(process, file) {
			users = append(users, fmt.Sprintf("%s (PID %s)", programOf(process), filepath.Base(process)))
		}
	}
	slices.Sort(users)
	return users
}

// locks tells whether a process, /proc/PID, has the file open with a lock that belongs to what it has open.
func locks(process string, file os.FileInfo) bool {
	if filepath.Base(process) == strconv.Itoa(os.Getpid()) {
		return false
	}
	opened, _ := filepath.Glob(process + "/fd/[0-9]*")
	for _, fd := range opened {
		if stat, err := os.Stat(fd); err != nil || !os.SameFile(stat, file) {
			continue
		}
		info, err := os.ReadFile(process + "/fdinfo/" + filepath.Base(fd))
		if err == nil && strings.Contains(string(info), "OFDLCK") {
			return true
		}
	}
	return false
}

// programOf returns what a process, /proc/PID, is for people: its program, and of this one the command too.
func programOf(process string) string {
	line, _ := os.ReadFile(process + "/cmdline")
	words := strings.Split(string(line), "\x00")
	name := filepath.Base(words[0])
	if words[0] == "" {
		return "a process"
	}
	if self, err := os.Executable(); err == nil && name == filepath.Base(self) && len(words) > 1 {
		name += " " + words[1]
	}
	return printable(name)
}

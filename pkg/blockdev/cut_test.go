package blockdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// cutEnv tells the test binary, started as a process to be cut, what to do: "operation border first", see cutMemory.
const cutEnv = "BLOCKDEV_TEST_CUT"

// cutRequest is what the journal's message holds in these tests.
func cutRequest() request {
	const payload = 512
	r := make(request, headRoom+payload)
	binary.NativeEndian.PutUint32(r, uint32(len(r)))
	binary.NativeEndian.PutUint32(r[4:], opWrite)
	binary.NativeEndian.PutUint64(r[8:], 77)
	binary.NativeEndian.PutUint32(r.args()[16:], payload)
	for i := range payload {
		r[headRoom+i] = byte(i + 1)
	}
	return r
}

// cutOps are the operations on a message.
var cutOps = map[string]func(m message){
	"take":     func(m message) { m.take(cutRequest()) },
	"conclude": func(m message) { m.conclude(writeOutSize, 0) },
	"clear":    message.clear,
}

// cutMemory maps memory of a file, four pages with a message in them of which the byte at an offset from its page border is
// the first of the third page.
func cutMemory(f *os.File, border int) (pages []byte, m message, err error) {
	page := unix.Getpagesize()
	pages, err = unix.Mmap(int(f.Fd()), 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	return pages, message(pages[page-border:][:len(cutRequest())-headRoom+page]), nil
}

// cutProcess does an operation with one half of the memory read-only, and dies at the first store that goes there.
func cutProcess(what string) int {
	var op string
	var border int
	var first bool
	_, err := fmt.Sscan(what, &op, &border, &first)
	if err != nil {
		return 3
	}
	pages, m, err := cutMemory(os.NewFile(3, "memory"), border)
	if err != nil {
		return 3
	}
	half := pages[len(pages)/2:]
	if first {
		half = pages[:len(pages)/2]
	}
	if unix.Mprotect(half, unix.PROT_READ) != nil {
		return 3
	}
	cutOps[op](m)
	return 0
}

// runCut runs cutProcess on a file and tells whether the process died.
func runCut(t *testing.T, f *os.File, op string, border int, first bool) (cut bool) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %v", cutEnv, op, border, first))
	cmd.ExtraFiles = []*os.File{f}
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 2 { // 2: the Go runtime's, at a fault
		t.Fatalf("%s: %v\n%s", op, err, out)
	}
	return err != nil
}

// Wherever a process dies, between any two stores to a message, the next one finds in it what the journal's rules promise.
func TestJournalCut(t *testing.T) {
	r := cutRequest()
	held := func(m message) bool { return *m.length() != 0 }
	concluded := func(m message) bool { return *m.outcome() != 0 }
	whole := func(m message) bool { return int(*m.length()) == len(r) && bytes.Equal(m.held(), r) }
	for _, op := range []struct {
		what   string
		before []string
		ok     func(m message) bool
	}{
		{"take", nil, func(m message) bool { return !held(m) || whole(m) }},
		{"conclude", []string{"take"}, func(m message) bool { return concluded(m) || whole(m) }},
		{"clear", []string{"take", "conclude"}, func(m message) bool { return concluded(m) || !held(m) }},
	} {
		cuts := 0
		// Between the outcome and the length, the length and the rest of the request, in its head, before the data, in it.
		for _, border := range []int{-headRoom, 4 - headRoom, 40 - headRoom, -outHeaderSize, 0, 8, 256} {
			for _, first := range []bool{false, true} {
				fd, err := unix.MemfdCreate("message", unix.MFD_CLOEXEC)
				must(t, err)
				f := os.NewFile(uintptr(fd), "message")
				must(t, f.Truncate(int64(4*unix.Getpagesize())))
				pages, m, err := cutMemory(f, border)
				must(t, err)
				for _, before := range op.before {
					cutOps[before](m)
				}
				if runCut(t, f, op.what, border, first) {
					cuts++
				}
				if !op.ok(m) {
					t.Errorf("%s, cut at the first store %s byte %d: length %d, outcome %#x", op.what,
						map[bool]string{true: "before", false: "behind"}[first], border, *m.length(), *m.outcome())
				}
				must(t, errors.Join(unix.Munmap(pages), f.Close()))
			}
		}
		if cuts < 4 {
			t.Errorf("%s was cut %d times: this test proves little", op.what, cuts)
		}
	}
}

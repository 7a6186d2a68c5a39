package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// This file looks at the snapshot commands from outside: strace notes each system call on the image, and what a kill
// between any two of them leaves must be the old or the new state, as QEMU sees it.

// TestTracedSnapshots kills create, goto and delete before each system call.
func TestTracedSnapshots(t *testing.T) {
	t.Parallel()
	for _, cluster := range []string{"4K", "64K"} {
		for _, args := range [][]string{{"create", "three"}, {"goto", "one"}, {"delete", "one"}} {
			t.Run(cluster+"/"+args[0], func(t *testing.T) {
				dir := t.TempDir()
				image, replayed := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "replayed.qcow2")
				snapshotted(t, image, cluster)
				copyFile(t, image, replayed)
				before := stateOf(t, image)
				calls := trace(t, image, "image", "snapshot", args[0], image, args[1])
				after := stateOf(t, image)
				if before == after {
					t.Fatalf("nothing has changed: %s", before)
				}
				replay(t, replayed, calls, before, after)
			})
		}
	}
}

// snapshotted makes an image of two snapshots and an active disk that shares clusters with each.
func snapshotted(t *testing.T, image, cluster string) {
	t.Helper()
	mustRun(t, "image", "create", "--cluster-size", cluster, image, "8M")
	qemuIO(t, image, "write -P 1 0 1M", "write -P 2 5M 300K")
	qemu(t, "qemu-img", "snapshot", "-c", "one", image)
	qemuIO(t, image, "write -P 3 512K 200K", "discard 0 128K", "write -z 5M 64K")
	mustRun(t, "image", "snapshot", "create", image, "two")
	qemuIO(t, image, "write -P 4 600K 1M", "write -P 5 7M 4K")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// stateOf is what QEMU reads: the snapshots and the content of each and of the active disk.
func stateOf(t *testing.T, image string) string {
	t.Helper()
	var info struct {
		Snapshots []struct{ Name string }
	}
	decode(t, qemu(t, "qemu-img", "info", "-f", "qcow2", "--output=json", image), &info)
	raw := filepath.Join(t.TempDir(), "raw")
	read := func(args ...string) string {
		qemu(t, "qemu-img", append([]string{"convert", "-f", "qcow2", "-O", "raw", image, raw}, args...)...)
		b, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%x", sha256.Sum256(b))[:16]
	}
	states := []string{"active " + read()}
	for _, s := range info.Snapshots {
		states = append(states, s.Name+" "+read("-l", "snapshot.name="+s.Name))
	}
	return strings.Join(states, ", ")
}

// tracedCall is a system call on the image.
type tracedCall struct {
	name, args string
	result     int64
	line       string // to tell about it
}

// strace 6 prints a call in one line, or if others come in between in two. A thread that ends with its process at the very
// beginning of a call has no name for it.
var (
	wholeCall   = regexp.MustCompile(`^(\d+) +(\w+)\((.*)\) += (-?\d+)( .*)?$`)
	callBegins  = regexp.MustCompile(`^(\d+) +(\w+\(.*?),? *<unfinished \.{3}>$`)
	neverMade   = regexp.MustCompile(`^\d+ +\?{3}\(`)
	callResumes = regexp.MustCompile(`^(\d+) +<\.{3} \w+ resumed>(.*)$`)
)

// trace runs csi-qcow2 under strace and returns its successful calls on the image, in the order in which they ended.
func trace(t *testing.T, image string, args ...string) []tracedCall {
	t.Helper()
	log := filepath.Join(t.TempDir(), "strace")
	cmd := program(t, args...)
	// All threads, all calls on the image, strings whole and in hexadecimal.
	strace := exec.CommandContext(t.Context(), "strace", append([]string{"-f", "-P", image, "-xx", "-s", "16777216", "-o", log}, cmd.Args...)...)
	strace.Env = cmd.Env
	if out, err := strace.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strace, err, out)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	var calls []tracedCall
	begun := map[string]string{} // by thread
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if m := callBegins.FindStringSubmatch(line); m != nil {
			begun[m[1]] = m[2]
			continue
		}
		if m := callResumes.FindStringSubmatch(line); m != nil {
			if rest := m[2]; strings.HasPrefix(rest, ")") || begun[m[1]][len(begun[m[1]])-1] == '(' {
				line = m[1] + " " + begun[m[1]] + rest
			} else {
				line = m[1] + " " + begun[m[1]] + ", " + strings.TrimLeft(rest, " ")
			}
			delete(begun, m[1])
		}
		m := wholeCall.FindStringSubmatch(line)
		switch {
		case len(m) > 0 && strings.HasPrefix(m[4], "-"): // failed, without effect
		case len(m) > 0:
			result, _ := strconv.ParseInt(m[4], 10, 64) // digits
			calls = append(calls, tracedCall{name: m[2], args: m[3], result: result, line: shorten(line)})
		case !neverMade.MatchString(line) && !strings.Contains(line, "---") && !strings.Contains(line, "+++"): // a signal, an exit
			t.Fatalf("strace says %s", shorten(line))
		}
	}
	if len(begun) > 0 {
		t.Fatalf("calls that never ended: %q", begun)
	}
	return calls
}

// quoted is a string of strace's.
var quoted = regexp.MustCompile(`"[^"]*"`)

func shorten(line string) string { return line[:min(len(line), 200)] }

// harmless are the calls that do not change a file.
var harmless = []string{
	"openat", "close", "epoll_ctl", "fstat", "newfstatat", "statx", "fcntl", "pread64", "preadv", "read", "lseek", "fsync", "fdatasync",
	"sync_file_range", "fadvise64", // content stays as it is: the one only writes early what will be written anyway
	"fgetxattr", "fsetxattr", "utimensat", // the mark is not part of the content
}

// apply makes the call on f, and tells whether it changes anything. What it does not know fails the test.
func (c tracedCall) apply(t *testing.T, f *os.File) bool {
	t.Helper()
	if slices.Contains(harmless, c.name) && !strings.Contains(c.args, "O_TRUNC") {
		return false
	}
	args := strings.Split(c.args, ", ") // of numbers: data is in hexadecimal
	number := func(i int) int64 {
		n, err := strconv.ParseInt(args[i], 0, 64)
		if err != nil {
			t.Fatalf("%s: %v", c.line, err)
		}
		return n
	}
	var err error
	switch c.name {
	case "pwrite64", "pwritev":
		var data []byte
		for _, s := range quoted.FindAllString(c.args, -1) {
			data = append(data, unhex(t, s)...)
		}
		if int64(len(data)) < c.result {
			t.Fatalf("%s: %d bytes written, %d seen", c.line, c.result, len(data))
		}
		_, err = f.WriteAt(data[:c.result], number(len(args)-1))
	case "ftruncate":
		err = f.Truncate(number(1))
	case "fallocate":
		mode := uint32(0)
		for name := range strings.SplitSeq(args[1], "|") {
			flag, ok := map[string]uint32{
				"0": 0, "FALLOC_FL_KEEP_SIZE": unix.FALLOC_FL_KEEP_SIZE, "FALLOC_FL_PUNCH_HOLE": unix.FALLOC_FL_PUNCH_HOLE,
				"FALLOC_FL_ZERO_RANGE": unix.FALLOC_FL_ZERO_RANGE,
			}[name]
			if !ok {
				t.Fatalf("%s: mode %s", c.line, name)
			}
			mode |= flag
		}
		err = unix.Fallocate(int(f.Fd()), mode, number(2), number(3))
	default:
		t.Fatalf("%s: this test does not know what that does", c.line)
	}
	if err != nil {
		t.Fatalf("%s: %v", c.line, err)
	}
	return true
}

// unhex decodes a string that strace prints in hexadecimal.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	digits := strings.Trim(s, `"`)
	var b bytes.Buffer
	for i := 0; i < len(digits); i += 4 { // \x00
		v, err := strconv.ParseUint(digits[i+2:i+4], 16, 8)
		if err != nil {
			t.Fatalf("%s: %v", shorten(s), err)
		}
		b.WriteByte(byte(v))
	}
	return b.Bytes()
}

// replay makes the calls one by one on the image as it was, and looks at it after each.
func replay(t *testing.T, image string, calls []tracedCall, before, after string) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	state, changes, switches := before, 0, 0
	for i, c := range calls {
		if !c.apply(t, f) {
			continue
		}
		changes++
		for _, check := range []func() int{
			func() int {
				return statusOf(t, exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", image))
			},
			func() int { return run(t, "image", "check", image).status },
		} {
			if status := check(); status != 0 && status != 3 {
				t.Errorf("after call %d of %d, %s: a check exits %d", i+1, len(calls), c.line, status)
			}
		}
		now := stateOf(t, image)
		if now != before && now != after {
			t.Fatalf("after call %d of %d, %s: neither the old state nor the new one\nold: %s\nnew: %s\nnow: %s", i+1, len(calls), c.line, before, after, now)
		}
		if now != state {
			state = now
			switches++
		}
	}
	if state != after || switches != 1 {
		t.Errorf("the state changed %d times, and is at last %s", switches, state)
	}
	t.Logf("%d system calls, %d of which change the image", len(calls), changes)
}

func statusOf(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

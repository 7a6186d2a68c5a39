// Package powercut tells what a power cut may leave of a directory tree. Trace records, with strace, every call that a
// process makes on the tree, so nothing can bypass it; a Disk replays the calls and knows what of them is durable; Cuts are
// the trees that a cut may leave then.
//
// The disk is the weakest that POSIX, ext4, XFS and btrfs allow:
//
//   - A change of names is durable when a directory that it changes has been synced. Until then it may have happened or
//     not, in any combination with others, but the changes of one file's own name happen in their order. A rename is atomic.
//   - The sync of a file makes its content durable, not its name.
//   - Until then each write, and each change of the length, may have happened or not; of a write also the new length alone,
//     which reads as zeros, and any of its sectors.
package powercut

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// NotePrefix begins what a traced process writes to its standard output, by one call, to be found in the trace.
const NotePrefix = "powercut: "

// Call is a successful system call of a traced process, or a note.
type Call struct {
	Note string // without the prefix

	name    string
	args    []string // as strace has them
	strings []string // those of args that are strings
	result  int64
}

// strace prints a call in one line, or if others come in between in two. A thread that ends with its process at the very
// beginning of a call has no name for it.
var (
	wholeCall   = regexp.MustCompile(`^(\d+) +(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)( .*)?$`)
	callBegins  = regexp.MustCompile(`^(\d+) +(\w+\(.*?),? *<unfinished \.{3}>$`)
	neverMade   = regexp.MustCompile(`^\d+ +\?{3}\(`)
	callResumes = regexp.MustCompile(`^(\d+) +<\.{3} \w+ resumed>(.*)$`)
	quoted      = regexp.MustCompile(`"[^"]*"`)
)

// untraced are calls that are frequent and change no file.
const untraced = "!read,pread64,readv,preadv,preadv2,fstat,newfstatat,statx,getdents64,readlinkat,munmap,mprotect,madvise," +
	"futex,epoll_pwait,epoll_ctl,nanosleep,sched_yield,rt_sigprocmask,rt_sigaction,rt_sigreturn,sigaltstack,tgkill,getpid,gettid"

// Trace runs a command, which must succeed and start no other, and returns its successful calls in the order in which they
// ended. What it writes to its standard output is not lost: it is logged if it fails.
func Trace(t *testing.T, cmd *exec.Cmd) []Call {
	t.Helper()
	log := filepath.Join(t.TempDir(), "strace")
	// All threads; strings whole and in hexadecimal.
	args := append([]string{"-f", "-qq", "--seccomp-bpf", "-xx", "-s", "16777216", "-e", "trace=" + untraced, "-o", log}, cmd.Args...)
	strace := exec.CommandContext(t.Context(), "strace", args...)
	strace.Env = cmd.Env
	if out, err := strace.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, text)
}

func parse(t *testing.T, text []byte) []Call {
	t.Helper()
	var calls []Call
	begun := map[string]string{} // by thread
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if m := callBegins.FindStringSubmatch(line); m != nil {
			begun[m[1]] = m[2]
			continue
		}
		if m := callResumes.FindStringSubmatch(line); m != nil {
			line = m[1] + " " + rejoin(begun[m[1]], m[2])
			delete(begun, m[1])
		}
		m := wholeCall.FindStringSubmatch(line)
		switch {
		case len(m) > 0 && m[4] != "?" && m[4][0] != '-':
			calls = append(calls, newCall(t, m[2], m[3], m[4]))
		case len(m) == 0 && !neverMade.MatchString(line) && !strings.Contains(line, "---") && !strings.Contains(line, "+++"): // a signal, an exit
			t.Fatalf("strace says %.200s", line)
		}
	}
	return calls
}

// rejoin puts the two halves of a call together.
func rejoin(begin, rest string) string {
	if strings.HasPrefix(rest, ")") || strings.HasSuffix(begin, "(") {
		return begin + rest
	}
	return begin + ", " + strings.TrimLeft(rest, " ")
}

func newCall(t *testing.T, name, args, result string) Call {
	t.Helper()
	n, err := strconv.ParseInt(result, 0, 64)
	if err != nil {
		n = -1 // an address
	}
	c := Call{name: name, args: strings.Split(args, ", "), result: n} // a string holds no comma: it is in hexadecimal
	for _, s := range quoted.FindAllString(args, -1) {
		c.strings = append(c.strings, unhex(t, strings.Trim(s, `"`)))
	}
	if name == "write" && c.args[0] == "1" {
		c.Note, _ = strings.CutPrefix(c.strings[0], NotePrefix)
		if c.Note == c.strings[0] {
			c.Note = ""
		}
	}
	return c
}

// unhex decodes a string of the form \x00\x00.
func unhex(t *testing.T, s string) string {
	t.Helper()
	var b bytes.Buffer
	b.Grow(len(s) / 4)
	for ; s != ""; s = s[4:] {
		if len(s) < 4 {
			t.Fatalf("strace has cut a string: %q", s)
		}
		v, err := strconv.ParseUint(s[2:4], 16, 8)
		if err != nil {
			t.Fatalf("strace's string has %q", s[:4])
		}
		b.WriteByte(byte(v))
	}
	return b.String()
}

// number returns a numeric argument, or the number behind name= in it.
func (c Call) number(t *testing.T, i int) int64 {
	t.Helper()
	_, digits, found := strings.Cut(c.args[i], "=")
	if !found {
		digits = c.args[i]
	}
	n, err := strconv.ParseInt(strings.Trim(digits, "{}"), 0, 64)
	if err != nil {
		t.Fatalf("%s: argument %d: %v", c, i, err)
	}
	return n
}

func (c Call) String() string {
	s := c.name + "(" + strings.Join(c.args, ", ")
	return s[:min(len(s), 200)] + ")"
}

// Changes tells whether a call is of a kind that changes files.
func (c Call) Changes() bool {
	switch c.name {
	case "mkdirat", "unlinkat", "renameat", "renameat2", "pwrite64", "pwritev", "ftruncate", "fallocate", "fsync", "fdatasync", "syncfs":
		return true
	}
	return false
}

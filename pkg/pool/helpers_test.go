package pool

import (
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const testSize = 64 << 20

// newPool makes a pool in a directory of the test's own.
func newPool(t *testing.T) *Pool {
	t.Helper()
	return poolIn(t, filepath.Join(t.TempDir(), "pool"))
}

func poolIn(t *testing.T, path string) *Pool {
	t.Helper()
	must(t, Init(path))
	p, err := Open(path)
	must(t, err)
	return p
}

// fillQCOW2 is what Create is given by a caller.
func fillQCOW2(ctx context.Context, path string) error {
	f, err := qcow2.CreateFile(path)
	if err != nil {
		return err
	}
	return errors.Join(qcow2.Create(ctx, f, testSize, qcow2.CreateOptions{}), f.Close())
}

func newVolume(p *Pool, name string) Volume {
	return Volume{ID: p.NewID(name), Name: name, Size: testSize, Parameters: map[string]string{"clusterSize": "65536"}}
}

// create makes a volume and returns its ID.
func create(t *testing.T, p *Pool, name string) string {
	t.Helper()
	v := newVolume(p, name)
	must(t, p.Create(t.Context(), v, fillQCOW2))
	return v.ID
}

func lock(t *testing.T, p *Pool, id string) *Lease {
	t.Helper()
	l, err := p.Lock(id)
	must(t, err)
	t.Cleanup(func() { _ = l.Unlock() }) // usually done before
	return l
}

// volumeIDs lists a pool that must be free of faults.
func volumeIDs(t *testing.T, p *Pool) []string {
	t.Helper()
	volumes, err := p.Volumes()
	must(t, err)
	ids := make([]string, 0, len(volumes))
	for _, v := range volumes {
		ids = append(ids, v.ID)
	}
	return ids
}

// checkImage lets our checker and QEMU's look at a volume's image.
func checkImage(t *testing.T, p *Pool, id string) {
	t.Helper()
	l := lock(t, p, id)
	img, err := l.Open(true)
	must(t, err)
	result, err := img.Check(t.Context(), nil)
	must(t, err, img.Close(), l.Unlock())
	if result.ExitStatus() != 0 {
		t.Errorf("check of %s: %+v", id, result)
	}
	runTool(t, "qemu-img", "check", "-q", p.ImagePath(id))
}

// must fails the test if something that is only on its way goes wrong.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// want compares an error with a sentinel, or nil.
func want(t *testing.T, what string, err, sentinel error) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Errorf("%s: %v, want %v", what, err, sentinel)
	}
}

func errOf[T any](_ T, err error) error { return err }

func runTool(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
}

// tree lists all that is below a directory, sorted.
func tree(t *testing.T, path string) []string {
	t.Helper()
	found := []string{}
	must(t, filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
		if p != path && err == nil {
			found = append(found, p[len(path)+1:])
		}
		return err
	}))
	return found
}

// Environment of a process that plays a part in a test: this program again, running TestChild.
const (
	childRole = "POOL_TEST_CHILD"
	childPool = "POOL_TEST_POOL"
	childArg  = "POOL_TEST_ARG"
)

// child is another process. It has said a line on its standard output when it is where the test wants it, and goes on,
// or ends, when its standard input ends.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	lines *bufio.Scanner
}

func startChild(t *testing.T, role string, p *Pool, arg string) *child {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestChild$", "-test.v=false")
	cmd.Env = append(os.Environ(), childRole+"="+role, childPool+"="+p.Dir(), childArg+"="+arg)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	c := &child{cmd, stdin, bufio.NewScanner(stdout)}
	t.Cleanup(func() { c.kill() })
	return c
}

// says waits for the child's next line.
func (c *child) says(t *testing.T, want string) {
	t.Helper()
	if !c.lines.Scan() || c.lines.Text() != want {
		t.Fatalf("the child said %q, want %q; %v", c.lines.Text(), want, c.lines.Err())
	}
}

// kill ends it with SIGKILL. Its end is awaited; ended already is fine.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// finish lets the child go on, and wants it to succeed.
func (c *child) finish(t *testing.T) {
	t.Helper()
	must(t, c.stdin.Close())
	for c.lines.Scan() {
		t.Log(c.lines.Text())
	}
	must(t, c.cmd.Wait())
}

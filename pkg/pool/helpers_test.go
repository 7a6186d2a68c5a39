package pool

import (
	"context"
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
	if err := Init(path); err != nil {
		t.Fatal(err)
	}
	return reopen(t, path)
}

func reopen(t *testing.T, path string) *Pool {
	t.Helper()
	p, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fillQCOW2 is what Create is given by a caller.
func fillQCOW2(_ context.Context, path string) error {
	f, err := qcow2.CreateFile(path)
	if err != nil {
		return err
	}
	if err := qcow2.Create(f, testSize, qcow2.CreateOptions{}); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

// create makes a volume and returns its ID.
func create(t *testing.T, p *Pool, name string) string {
	t.Helper()
	v := Volume{ID: p.NewID(name), Name: name, Size: testSize, Parameters: map[string]string{"clusterSize": "65536"}}
	if err := p.Create(t.Context(), v, fillQCOW2); err != nil {
		t.Fatal(err)
	}
	return v.ID
}

func lock(t *testing.T, p *Pool, id string) *Lease {
	t.Helper()
	l, err := p.Lock(id)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// must fails the test if an operation that is only in its way does not succeed.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func runTool(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
}

// tree lists all that is below a directory.
func tree(t *testing.T, path string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(path, func(p string, _ os.DirEntry, err error) error {
		if p != path && err == nil {
			found = append(found, p[len(path)+1:])
		}
		return err
	})
	must(t, err)
	return found
}

package worker

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// Only an image that serves nothing more is a failed volume: a failed one may be replaced under its users.
func TestBackendFailure(t *testing.T) {
	for _, c := range []struct {
		err    error
		failed bool
		errno  unix.Errno
	}{
		{fmt.Errorf("x: %w", qcow2.ErrFailed), true, unix.EIO},
		{fmt.Errorf("x: %w", qcow2.ErrCorrupt), false, unix.EIO},
		{fmt.Errorf("x: %w", qcow2.ErrNoSpace), false, unix.ENOSPC},
		{errors.New("x"), false, unix.EIO},
	} {
		var b backend
		if got := b.note(&b.reads, time.Now(), 0, c.err); !errors.Is(got, c.err) {
			t.Errorf("%v became %v", c.err, got)
		}
		if got := b.failed.Load() != nil; got != c.failed {
			t.Errorf("%v: failed is %v", c.err, got)
		}
		if got := errno(c.err); got != uintptr(c.errno) {
			t.Errorf("%v is errno %d, want %d", c.err, got, c.errno)
		}
	}
}

package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A pool's disk may be pulled, or its file system fail or be unmounted, while an engine serves it. The engine's own lock file
// would keep that file system busy for good: it could neither be unmounted nor mounted anew from a disk that has come back under
// another name. So an engine lets go of a pool that is lost as soon as no volume of it is attached, and waits for it again.

// awaitLoss looks at the pool until it was lost and let go. It returns an error when ctx ends.
func (s *supervisor) awaitLoss(ctx context.Context) error {
	disk := diskOf(s.openedPool())
	tick := time.NewTicker(poolPoll)
	defer tick.Stop()
	for told := ""; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		err := s.poolLost(disk)
		if err == nil {
			told = ""
			s.setLost(nil)
			continue
		}
		users, free := s.letGo()
		if free {
			klog.ErrorS(err, "The pool is lost, waiting for it", "pool", s.options.PoolDir)
			return nil
		}
		err = rpc.Refuse(ErrUnavailable, "the pool is lost, and its file system stays busy until the pods that use these volumes have ended, %s: %w",
			strings.Join(users, ", "), err)
		s.setLost(err)
		if err.Error() != told {
			told = err.Error()
			klog.ErrorS(err, "The pool is lost, and in use", "pool", s.options.PoolDir)
		}
	}
}

// setLost records why the pool that is open is not to be used.
func (s *supervisor) setLost(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lostPool = err
}

// poolLost tells why the pool that was opened is not there any more. What it looks at the kernel has in memory, as a rule: a disk
// that hangs does not hold it up.
func (s *supervisor) poolLost(disk string) error {
	s.mu.Lock()
	p, lock := s.pool, s.lockFile
	s.mu.Unlock()
	if lock == nil {
		return nil // it shuts down
	}
	if disk != "" {
		if _, err := os.Stat(disk); errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("its disk is gone: %w", err)
		}
	}
	if err := p.Ready(); err != nil {
		return err
	}
	ours, err := lock.Stat()
	if err != nil {
		return err
	}
	now, err := os.Stat(lock.Name())
	if err != nil {
		return err
	}
	if !os.SameFile(ours, now) {
		return fmt.Errorf("%w: another file system is mounted there", pool.ErrNotReady)
	}
	return nil
}

// diskOf returns where the kernel shows the disk of a pool's file system, "" if it does not.
func diskOf(p *pool.Pool) string {
	var st unix.Stat_t
	if err := unix.Stat(p.Dir(), &st); err != nil {
		return ""
	}
	path := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if _, err := os.Stat(path); err != nil {
		return "" // as that of btrfs, which may have several
	}
	return path
}

// letGo closes the pool, unless something of it is in use, which is returned.
func (s *supervisor) letGo() (users []string, free bool) {
	s.opening.Lock() // a call that begins now waits, and opens the pool
	defer s.opening.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, false
	}
	users = slices.AppendSeq(slices.Sorted(maps.Keys(s.attached)), maps.Keys(s.clones))
	if len(users) > 0 || !s.calls.idle() {
		return users, false
	}
	_ = s.lockFile.Close()
	s.recovered, s.pool, s.lockFile, s.lostPool = false, nil, nil, nil
	return nil, true
}

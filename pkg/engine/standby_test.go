package engine

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// children returns the processes that a process has started.
func children(t *testing.T, pid int) (pids []int) {
	t.Helper()
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	must(t, err)
	for _, task := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		if err != nil { // the thread has ended
			continue
		}
		for _, word := range strings.Fields(string(b)) {
			var child int
			_, err := fmt.Sscan(word, &child)
			must(t, err)
			pids = append(pids, child)
		}
	}
	return pids
}

// An engine that stands by has a worker ready for each volume. Those of which there is no need any more end; one that has
// died is started again.
func TestStandbys(t *testing.T) {
	const size = 16 * mib
	for _, die := range []bool{false, true} {
		t.Run(fmt.Sprintf("they die %v", die), func(t *testing.T) {
			r := newHeldRig(t)
			kept, gone := r.newVolume("kept", size), r.newVolume("gone", size)
			l := startLoad(t, r.attach(kept), size, 2)
			r.attach(gone)
			r.upgradeAfter(func(next *testEngine) {
				r.detach(gone)
				standbys := children(t, next.cmd.Process.Pid)
				if len(standbys) != 2 {
					t.Errorf("%d workers wait for two volumes", len(standbys))
				}
				for _, pid := range standbys {
					if die {
						must(t, unix.Kill(pid, unix.SIGKILL))
					}
				}
			})
			r.awaitReplaced(kept, 0)
			r.eventually("the other worker ends", func() bool { return len(children(t, r.engine.cmd.Process.Pid)) == 1 })
			l.awaitProgress(t)
			l.end(t)
			l.verify(t, l.device)
		})
	}
}

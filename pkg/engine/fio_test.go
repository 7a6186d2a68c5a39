package engine

import (
	"bytes"
	"fmt"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
)

// startFio has fio write a part of a device at random and verify it, over and over, until stop is called or the test ends.
// stop waits for the verification that is under way.
func startFio(t *testing.T, device string, off, size int64) (stop func()) {
	t.Helper()
	var quit atomic.Bool
	var running sync.WaitGroup
	runs := 0
	running.Go(func() {
		for ; !quit.Load(); runs++ {
			out, err := exec.Command("fio", "--name=verify", "--filename="+device, "--rw=randwrite",
				fmt.Sprintf("--offset=%d", off), fmt.Sprintf("--size=%d", size), "--bsrange=4k-128k", "--direct=1", "--fsync=32",
				"--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0").CombinedOutput()
			if err != nil {
				t.Errorf("fio: %v\n%s", err, bytes.TrimSpace(out))
				return
			}
		}
	})
	stop = sync.OnceFunc(func() {
		quit.Store(true)
		running.Wait()
		t.Logf("fio has written and verified %d times", runs)
	})
	t.Cleanup(stop)
	return stop
}

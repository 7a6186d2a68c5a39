package engine

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var soak = flag.Duration("soak", 4*time.Second, "how long TestSoak works")

// usage is what a process has.
type usage struct {
	fds int
	mib int // resident
}

func usageOf(t *testing.T, pid int) usage {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	must(t, err)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	must(t, err)
	var virtual, resident int
	_, err = fmt.Sscan(string(b), &virtual, &resident)
	must(t, err)
	return usage{len(fds), resident * os.Getpagesize() / mib}
}

// Two volumes live through all that happens to volumes: they are written, read and verified, snapshots come and go, they
// grow, the workers of one are killed, the engine is upgraded now and then. In between nothing takes more and more memory
// or descriptors.
func TestSoak(t *testing.T) {
	r := newHeldRig(t)
	const size = 256 * mib
	spared, killed := r.newVolume("spared", size), r.newVolume("killed", size)
	sizes := map[string]int64{spared: size, killed: size}
	var loads []*load
	for _, id := range []string{spared, killed} {
		loads = append(loads, startLoad(t, r.attach(id), size, 4))
		t.Cleanup(r.snapshots(id))
	}
	rng := rand.New(rand.NewPCG(3, 4))
	kills := 0
	// work does for a while what happens all the time.
	work := func(lasts time.Duration) {
		for end := time.Now().Add(lasts); time.Now().Before(end) && !t.Failed(); kills++ {
			for _, l := range loads {
				l.awaitProgress(t)
				if l.failed() {
					t.Fatalf("a user of %s failed", l.device)
				}
			}
			<-time.After(time.Duration(rng.IntN(int(min(lasts, 2*time.Second)))))
			r.killWorker(killed)
			for id := range sizes {
				if n, err := r.client.Resize(testContext(t), id, sizes[id]+mib); err == nil {
					sizes[id] = n
				} else if id == spared || !errors.Is(err, ErrUnavailable) {
					t.Errorf("resize: %v", err)
				}
			}
		}
	}
	const eras = 4
	for era := range eras {
		if era > 0 {
			r.upgrade()
			r.awaitReplaced(spared, 0)
		}
		work(*soak / eras / 4)
		processes := map[string]int{
			"holder": r.holder.cmd.Process.Pid, "engine": r.engine.cmd.Process.Pid, "worker": r.find(spared).WorkerPID,
		}
		before := map[string]usage{}
		for name, pid := range processes {
			before[name] = usageOf(t, pid)
		}
		work(*soak / eras * 3 / 4)
		for name, pid := range processes {
			b, now := before[name], usageOf(t, pid)
			t.Logf("%s: %d descriptors, %d MiB; %d and %d before", name, now.fds, now.mib, b.fds, b.mib)
			// What comes and goes with a call or a dying worker, and what is not collected yet.
			if now.fds > b.fds+16 || now.mib > 2*b.mib+32 {
				t.Errorf("the %s grows", name)
			}
		}
	}
	for _, l := range loads {
		l.awaitProgress(t)
		t.Logf("%d requests, the longest %v", l.done.Load(), l.end(t))
	}
	t.Logf("%d kills, sizes %s", kills, strings.Trim(fmt.Sprint(sizes), "map[]"))
	for i, id := range []string{spared, killed} {
		loads[i].verify(t, r.attach(id))
	}
}

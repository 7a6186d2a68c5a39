package engine

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// warmMiB is what a process of these tests may reach before it counts as growing: the race detector keeps more than was touched.
const warmMiB = 256

// wantSteady checks that a process usually has no more in the second half of its samples than in the first, but for what comes
// and goes with a call or a dying worker, and what is not collected yet.
func wantSteady(t *testing.T, name string, samples []usage) {
	t.Helper()
	t.Logf("%s: descriptors and MiB were %v", name, samples)
	usual := func(of []usage, figure func(usage) int) int {
		figures := make([]int, 0, len(of))
		for _, u := range of {
			figures = append(figures, figure(u))
		}
		slices.Sort(figures)
		return figures[len(figures)/2]
	}
	fds, mib := func(u usage) int { return u.fds }, func(u usage) int { return u.mib }
	before, now := samples[:len(samples)/2], samples[len(samples)/2:]
	if usual(now, fds) > usual(before, fds)+16 || usual(now, mib) > max(warmMiB, usual(before, mib)*5/4+16) {
		t.Errorf("the %s grows", name)
	}
}

// wantSpace checks that the images take no more of the host's disk than their disks, few snapshots and what is on its way.
func (r *rig) wantSpace(sizes map[string]int64) {
	r.t.Helper()
	for id, size := range sizes {
		var st unix.Stat_t
		must(r.t, unix.Stat(r.pool.ImagePath(id), &st))
		r.t.Logf("%s takes %d MiB, in a file of %d, for a disk of %d", id, st.Blocks*512/mib, st.Size/mib, size/mib)
		if st.Blocks*512 > 8*size {
			r.t.Errorf("the space of %s grows", id)
		}
	}
}

// Two volumes live through all that happens to volumes: fio and others write, read and verify them, snapshots come and go,
// they grow, the workers of one are killed, the engine is upgraded now and then. In between nothing takes more and more
// memory, descriptors or space.
func TestSoak(t *testing.T) {
	t.Parallel()
	r := newHeldRig(t)
	const size = 256 * mib
	spared, killed := r.newVolume("spared", size+fioSize), r.newVolume("killed", size+fioSize)
	sizes := map[string]int64{spared: size + fioSize, killed: size + fioSize}
	var loads []*load
	var fios []func()
	for _, id := range []string{spared, killed} {
		device := r.attach(id)
		loads = append(loads, startLoad(t, device, size, 4))
		fios = append(fios, startFio(t, device, size, fioSize))
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
				if n, err := r.client.Resize(testContext(t), id, sizes[id]+mib, 0); err == nil {
					sizes[id] = n
				} else if id == spared || !errors.Is(err, ErrUnavailable) {
					t.Errorf("resize: %v", err)
				}
			}
		}
	}
	const samples = 6
	eras := 2
	if *soak > time.Minute {
		eras = 4
	}
	holder := make([]usage, 0, eras*samples)
	for era := range eras {
		if era > 0 {
			r.upgrade()
			r.awaitReplaced(spared, 0)
		}
		engine, worker := make([]usage, 0, samples), make([]usage, 0, samples)
		for range samples {
			work(*soak / time.Duration(eras*samples))
			holder = append(holder, usageOf(t, r.holder.cmd.Process.Pid))
			engine = append(engine, usageOf(t, r.engine.cmd.Process.Pid))
			worker = append(worker, usageOf(t, r.find(spared).WorkerPID))
		}
		wantSteady(t, "engine", engine)
		wantSteady(t, "worker", worker)
		r.wantSpace(sizes)
	}
	wantSteady(t, "holder", holder)
	for i, l := range loads {
		l.awaitProgress(t)
		fios[i]()
		t.Logf("%d requests, the longest %v", l.done.Load(), l.end(t))
	}
	t.Logf("%d kills, sizes %s", kills, strings.Trim(fmt.Sprint(sizes), "map[]"))
	for i, id := range []string{spared, killed} {
		loads[i].verify(t, r.attach(id))
	}
}

package pool

import (
	"encoding/json"
	"flag"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/powercut"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
)

// This file cuts the power at every moment of histories of pools, also in the middle of the start after an earlier cut, and
// after a process was killed and another one has taken over. Each state that a cut may leave is started on, and must keep
// what was promised: see powerJudge.

var powerStates = flag.Int("power-states", 600, "states that TestPowerCut tries, at least")

// TestPowerCut says in its log what was tried.
func TestPowerCut(t *testing.T) {
	tally := newPowerTally()
	systems := map[string]string{
		"xfs":   testfs.Image(t, "xfs", 320<<20, "mkfs.xfs", "-q", "-m", "reflink=1"),
		"ext4":  testfs.Image(t, "ext4", 64<<20, "mkfs.ext4", "-q", "-F"),
		"btrfs": testfs.Image(t, "btrfs", 128<<20, "mkfs.btrfs", "-q"),
	}
	scratch := testfs.Tmpfs(t, "512m")
	plan := powerPlanFor(*powerStates)
	for seed := uint64(0); !t.Failed() && tally.states() < *powerStates; seed++ {
		for i, history := range slices.Sorted(maps.Keys(powerHistories())) {
			for j, fs := range slices.Sorted(maps.Keys(systems)) {
				if plan.oneSystem && (i+j+int(seed))%len(systems) != 0 {
					continue
				}
				t.Run(fmt.Sprintf("%s on %s, seed %d", history, fs, seed), func(t *testing.T) {
					c := &cutter{
						t: t, plan: plan, tally: tally, history: history, dir: filepath.Join(systems[fs], t.Name()[len("TestPowerCut/"):]),
						rng: rand.New(rand.NewPCG(seed, uint64(i*10+j))), scratch: scratch, sum: maphash.MakeSeed(), seen: map[[2]uint64]bool{},
					}
					must(t, os.Mkdir(c.dir, 0o700))
					c.play()
					must(t, os.RemoveAll(c.dir))
				})
			}
		}
	}
	tally.report(t)
	if !t.Failed() {
		tally.complete(t, !plan.oneSystem)
	}
}

// powerPlan says how much is tried of a history.
type powerPlan struct {
	oneSystem bool // each history on one of the file systems
	limit     int  // of the states after each call
	kills     int  // of the process, each followed by one that goes on, in which the power is cut
	second    int  // states in which the power is cut again during the start
	goOn      int  // of so many states one is used on
}

func powerPlanFor(states int) powerPlan {
	if states < 20_000 {
		return powerPlan{oneSystem: true, limit: 6, kills: 3, second: 8, goOn: 25}
	}
	return powerPlan{limit: 40, kills: 20, second: 60, goOn: 5}
}

// cutter cuts the power of one history.
type cutter struct {
	t       *testing.T
	plan    powerPlan
	tally   *powerTally
	history string
	rng     *rand.Rand
	dir     string // for traced processes
	scratch string // for states

	sum      maphash.Seed
	seen     map[[2]uint64]bool // states, by what was promised
	promises uint64
	jobs     chan powerJob
	again    []powerJob // for a second cut
}

// promise is what the pool has promised at a moment.
type promise struct {
	doing   string  // what is going on
	allowed []facts // each fact is as one of these says
	about   string  // the whole, for messages
	killed  bool    // a process was killed before
	second  bool    // there was a cut before
}

// powerJob is a state to be judged.
type powerJob struct {
	powercut.State
	promise
	goOn bool
}

func (c *cutter) play() {
	home := c.home("first")
	before := facts{}
	if c.history == "upgrade" {
		formerPool(c.t, filepath.Join(home, "pool"))
		p, err := Open(filepath.Join(home, "pool"))
		must(c.t, err)
		before, err = readFacts(p)
		must(c.t, err)
	}
	disk := powercut.Load(c.t, home)
	calls := c.trace("history", filepath.Join(home, "pool"), fmt.Sprint(c.history, " 0 1000 start"))

	c.judging(func() {
		c.cut(disk, calls, promise{allowed: []facts{before}, about: c.history}, c.chooseKills(calls))
	})
	again := c.again
	c.rng.Shuffle(len(again), func(i, j int) { again[i], again[j] = again[j], again[i] })
	c.judging(func() { c.cutAgain(again[:min(len(again), c.plan.second)]) })
}

// home makes a directory that holds a pool: the pool's own name may be lost, too.
func (c *cutter) home(name string) string {
	path := filepath.Join(c.dir, name)
	must(c.t, os.Mkdir(path, 0o700))
	return path
}

// trace runs a process of this program.
func (c *cutter) trace(role, path, arg string) []powercut.Call {
	c.t.Helper()
	cmd := exec.CommandContext(c.t.Context(), os.Args[0], "-test.run=^TestPowerChild$")
	cmd.Env = append(os.Environ(), childRole+"="+role, childPool+"="+path, childArg+"="+arg)
	return powercut.Trace(c.t, cmd)
}

// judging judges, in two goroutines, what work finds.
func (c *cutter) judging(work func()) {
	c.jobs = make(chan powerJob)
	var judges sync.WaitGroup
	for i := range 2 {
		judges.Go(func() {
			for n := 0; ; n++ {
				job, ok := <-c.jobs
				if !ok {
					return
				}
				path := filepath.Join(c.scratch, fmt.Sprintf("%d-%d", i, n))
				if err := judge(c.t.Context(), path, job); err != nil {
					c.t.Errorf("power cut during %q (%s): %v\nthe cut left\n%s", job.doing, job.about, err, job.State)
				}
				_ = os.RemoveAll(path)
			}
		})
	}
	defer judges.Wait()
	defer close(c.jobs)
	work()
}

// cut cuts the power after each call of a traced process. now is what was promised before.
func (c *cutter) cut(disk *powercut.Disk, calls []powercut.Call, now promise, kills map[int]bool) {
	var notes []powerNote
	for _, call := range calls {
		if call.Note != "" {
			notes = append(notes, decodeNote(c.t, call))
		}
	}
	at := -1
	for i, call := range calls {
		if call.Note != "" {
			at++
			now = now.next(notes, at)
			c.promises++
		} else if !disk.Do(c.t, call) {
			continue
		}
		c.try(disk, now)
		if kills[i] {
			c.kill(disk, now, notes[max(at, 0)], i)
		}
		if c.t.Failed() {
			return
		}
	}
	must(c.t, disk.Verify(c.t))
}

// next returns what is promised from a note on.
func (p promise) next(notes []powerNote, at int) promise {
	n := notes[at]
	if n.Facts == nil || n.Unsure { // the promises stay as they are
		p.allowed = append(slices.Clone(p.allowed), n.Facts)
	} else {
		p.allowed = []facts{n.Facts}
	}
	if at+1 < len(notes) {
		p.allowed = append(slices.Clone(p.allowed), notes[at+1].Facts)
	}
	p.allowed = slices.DeleteFunc(p.allowed, func(f facts) bool { return f == nil })
	p.doing = n.Doing
	return p
}

func decodeNote(t *testing.T, call powercut.Call) (n powerNote) {
	t.Helper()
	must(t, json.Unmarshal([]byte(call.Note), &n))
	return n
}

// try has the states judged that a cut may leave now.
func (c *cutter) try(disk *powercut.Disk, now promise) {
	for s := range disk.Cuts(c.rng, c.plan.limit) {
		key := [2]uint64{s.Sum(c.sum), c.promises}
		if c.seen[key] {
			continue
		}
		c.seen[key] = true
		job := powerJob{State: s, promise: now, goOn: c.rng.IntN(c.plan.goOn) == 0}
		c.tally.add(job)
		c.jobs <- job
		if !now.second && c.rng.IntN(20) == 0 {
			c.again = append(c.again, job)
		}
	}
}

// chooseKills chooses calls that change the tree.
func (c *cutter) chooseKills(calls []powercut.Call) map[int]bool {
	kills := map[int]bool{}
	var changes []int
	for i, call := range calls {
		if call.Changes() {
			changes = append(changes, i)
		}
	}
	for range c.plan.kills {
		kills[changes[c.rng.IntN(len(changes))]] = true
	}
	return kills
}

// kill has another process go on where one was killed.
func (c *cutter) kill(disk *powercut.Disk, now promise, at powerNote, number int) {
	home := filepath.Join(c.dir, fmt.Sprintf("killed-%d", number))
	must(c.t, disk.Write(home))
	path := filepath.Join(home, "pool")
	how := "start"
	if _, err := Open(path); err == nil && slices.Contains(enginesOwn(), at.Doing) && c.rng.IntN(2) == 0 {
		how = "nothing" // the engine alone was killed
	}
	arg := fmt.Sprintf("%s %d 2 %s", c.history, at.Step, how)
	disk = disk.Clone(home)
	calls := c.trace("history", path, arg)
	now.killed = true
	now.about += ", killed during " + at.Doing + ", then " + how
	c.promises++
	c.cut(disk, calls, now, nil)
}

// enginesOwn are what the engine does by itself.
func enginesOwn() []string {
	return []string{"attach", "detach", "promise snapshot", "end promise", "mark", "unmark"}
}

// cutAgain cuts the power again, during the start after an earlier cut.
func (c *cutter) cutAgain(jobs []powerJob) {
	if c.t.Failed() {
		return
	}
	all := c.home("again")
	for i, job := range jobs {
		must(c.t, job.Write(filepath.Join(all, fmt.Sprintf("%04d", i))))
	}
	var disks []*powercut.Disk
	for i := range jobs {
		disks = append(disks, powercut.Load(c.t, filepath.Join(all, fmt.Sprintf("%04d", i))))
	}
	calls := c.trace("start", all, "")
	for i, job := range jobs {
		var own []powercut.Call
		in := false
		for _, call := range calls {
			if call.Note != "" {
				in = decodeNote(c.t, call).Step == i
			}
			if in {
				own = append(own, call)
			}
		}
		now := job.promise
		now.second = true
		now.about += ", cut during " + now.doing
		c.promises++
		c.cut(disks[i], own, now, nil)
	}
}

package qcow2

import (
	"flag"
	"fmt"
	"testing"
)

// This file crashes images at every moment of random histories (C1, C2). Each state that a crash may leave is checked,
// opened and compared with what was promised; a share of them goes on, by us, crashing again, and by QEMU.

var (
	crashStates = flag.Int("crash-states", 3000, "states that TestCrash tries, at least")
	crashSeed   = flag.Uint64("crash-seed", 0, "seed of TestCrash's first history")
)

// quickCrashStates is up to how many states crashes are sampled; from there on each moment is tried.
const quickCrashStates = 10_000

func crashPlanFor(states int) crashPlan {
	if states <= quickCrashStates {
		return crashPlan{share: 12, versions: 1, check: 60, goOn: 20, second: 10, qemu: 150}
	}
	return crashPlan{share: 1, versions: 6, check: 19, goOn: 12, second: 12, qemu: 60}
}

func TestCrash(t *testing.T) {
	y := newCrashTally()
	plan := crashPlanFor(*crashStates)
	seed := *crashSeed
	// Each batch plays histories of all configurations.
	for y.states() < *crashStates && !t.Failed() {
		t.Run(fmt.Sprintf("from seed %d", seed), func(t *testing.T) {
			for i, p := range crashConfigs() {
				seed := seed + uint64(i)
				t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
					t.Parallel()
					crashOnce(t, y, seed, p, plan)
					t.Logf("%d states so far", y.states())
				})
			}
			for i, p := range besideConfigs(seed) {
				seed := seed + uint64(i)
				t.Run(fmt.Sprintf("beside a guest, seed %d", seed), func(t *testing.T) {
					t.Parallel()
					crashBeside(t, y, seed, p, plan)
					t.Logf("%d states so far", y.states())
				})
			}
		})
		seed += uint64(len(crashConfigs()))
	}
	y.report(t)
	if !t.Failed() {
		y.complete(t)
	}
}

// crashOnce plays one history and crashes it.
func crashOnce(t *testing.T, y *crashTally, seed uint64, p crashParams, plan crashPlan) {
	t.Helper()
	if p.fullTable {
		plan = plan.rarer(20)
	}
	h := newCrashHistory(t, seed, p)
	h.rounds(int(seed) + int(seed)/len(crashConfigs()))
	h.end()
	h.crash(t, y, plan)
}

// rarer makes a plan for histories whose states are dear.
func (p crashPlan) rarer(times int) crashPlan {
	p.share *= times
	p.versions = min(p.versions, 2)
	return p
}

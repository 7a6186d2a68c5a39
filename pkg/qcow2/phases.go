package qcow2

import "time"

// Phase is a part of an operation on snapshots or the size, by what guests notice of it.
type Phase string

// The phases, in their order. An operation that stops guests has no PhaseCommit and no PhaseCatchUp: they wait from PhaseCut to its
// end.
const (
	PhasePrepare  Phase = "prepare"  // what guests have changed is committed, and clusters are reserved for them
	PhaseDrain    Phase = "drain"    // their requests under way end; new ones wait
	PhaseCut      Phase = "cut"      // all wait, for an instant that has no I/O
	PhaseCommit   Phase = "commit"   // what the instant has preserved is committed
	PhaseBuild    Phase = "build"    // tables and counts are written beside the live ones
	PhaseCatchUp  Phase = "catch up" // so is what has changed meanwhile
	PhaseWait     Phase = "wait"     // a commit or a reservation under way ends; from here on flushes wait
	PhaseComplete Phase = "complete" // what is still missing is written
	PhaseSync     Phase = "sync"
	PhaseSwitch   Phase = "switch" // the header's sector is written and synced
	PhaseAdopt    Phase = "adopt"  // memory follows; then flushes go on
	PhasePunch    Phase = "punch"  // what only the old generation used goes back to the file system
)

// phases tells OpenOptions.Trace how long each phase took.
type phases struct {
	trace func(Phase, time.Duration) // nil: nobody wants to know
	now   Phase                      // "": none
	since time.Time
}

// enter ends the phase that is under way, if there is one, and begins the next, if it is one. It is called by the running operation.
func (p *phases) enter(next Phase) {
	if p.trace == nil {
		return
	}
	at := time.Now()
	if p.now != "" {
		p.trace(p.now, at.Sub(p.since))
	}
	p.now, p.since = next, at
}

package qcow2

import (
	"slices"
	"testing"
	"time"
)

// An operation is told phase by phase: what guests go on beside, and what they wait for.
func TestPhases(t *testing.T) {
	f := newMemFile("traced")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	var seen []Phase
	img, err := Open(f, OpenOptions{Trace: func(p Phase, took time.Duration) {
		if took < 0 {
			t.Errorf("%s took %v", p, took)
		}
		seen = append(seen, p)
	}})
	must(t, err)
	_, err = img.WriteAt([]byte("before"), 0)
	must(t, err)

	check := func(what string, want ...Phase) {
		t.Helper()
		if !slices.Equal(seen, want) {
			t.Errorf("%s went through %q, want %q", what, seen, want)
		}
		seen = nil
	}
	_, err = img.CreateSnapshot(t.Context(), "s", nil)
	must(t, err)
	check("a snapshot", PhasePrepare, PhaseDrain, PhaseCut, PhaseCommit, PhaseBuild, PhaseCatchUp,
		PhaseWait, PhaseComplete, PhaseSync, PhaseSwitch, PhaseAdopt, PhasePunch)
	must(t, img.GotoSnapshot(t.Context(), ByName("s")))
	check("going back", PhasePrepare, PhaseDrain, PhaseCut, PhaseBuild,
		PhaseWait, PhaseComplete, PhaseSync, PhaseSwitch, PhaseAdopt, PhasePunch)
	if err := img.DeleteSnapshot(t.Context(), ByName("none")); err == nil {
		t.Error("a snapshot that is not there was deleted")
	}
	check("what cannot begin", PhasePrepare, PhaseDrain, PhaseCut)
	must(t, img.Close())
	checkSaved(t, f)
}

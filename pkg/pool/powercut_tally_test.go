package pool

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
)

// powerKinds are what a cut interrupts.
func powerKinds() []string {
	return []string{
		"init", "start", "bind", "create", "clone", "refused create", "attach", "write", "expand", "detach", "mark", "unmark", "keep reserve",
		"give up reserve", "promise snapshot", "snapshot", "end promise", "delete snapshot", "tombstone", "drop active", "delete",
	}
}

// powerColumns are how the states are counted: by what the cut has done, and by what was before.
func powerColumns() []string {
	return []string{"states", "name lost", "reordered", "lost", "zeros", "torn", "killed", "second", "go on"}
}

// powerTally counts the states. What is never hit fails the test, so that no change of the tests makes them blind.
type powerTally struct {
	mu   sync.Mutex // guards rows
	rows map[string]map[string]int
}

func newPowerTally() *powerTally {
	y := &powerTally{rows: map[string]map[string]int{}}
	for _, kind := range append(powerKinds(), "end") {
		y.rows[kind] = map[string]int{}
	}
	return y
}

func (y *powerTally) add(job powerJob) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for column, hit := range map[string]bool{
		"states": true, "name lost": job.Traits.NameLost, "reordered": job.Traits.OutOfOrder, "lost": job.Traits.ContentLost,
		"zeros": job.Traits.LengthOnly, "torn": job.Traits.Torn, "killed": job.killed, "second": job.second, "go on": job.goOn,
	} {
		if hit {
			y.rows[job.doing][column]++
		}
	}
}

func (y *powerTally) states() (n int) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, row := range y.rows {
		n += row["states"]
	}
	return n
}

// report prints the table.
func (y *powerTally) report(t *testing.T) {
	t.Helper()
	total := y.states()
	y.mu.Lock()
	defer y.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "%d states\n%-20s", total, "power cut during")
	for _, column := range powerColumns() {
		fmt.Fprintf(&b, " %9s", column)
	}
	for _, kind := range slices.Sorted(maps.Keys(y.rows)) {
		fmt.Fprintf(&b, "\n%-20s", kind)
		for _, column := range powerColumns() {
			fmt.Fprintf(&b, " %9d", y.rows[kind][column])
		}
	}
	t.Log(b.String())
}

// complete fails the test for what was never hit. In a long run, every kind must also have followed a kill.
func (y *powerTally) complete(t *testing.T, long bool) {
	t.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	total := map[string]int{}
	for _, kind := range powerKinds() {
		row := y.rows[kind]
		if row["states"] == 0 || long && row["killed"] == 0 && kind != "init" {
			t.Errorf("power cuts during %q: %v", kind, row)
		}
		for column, n := range row {
			total[column] += n
		}
	}
	for _, column := range powerColumns() {
		if total[column] == 0 {
			t.Errorf("no power cut was of the kind %q", column)
		}
	}
}

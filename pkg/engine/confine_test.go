package engine

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/internal/confined"
)

// Of root's capabilities a worker and a helper have those that they need.
func TestConfined(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", mib)
	r.attach(id)
	wantCapabilities(t, r.find(id).WorkerPID)
	h, err := helper.Start(nil)
	must(t, err)
	defer h.End()
	wantCapabilities(t, h.PID)
}

func wantCapabilities(t *testing.T, pid int) {
	t.Helper()
	// A machine may deny some to all its processes.
	b, err := os.ReadFile("/proc/thread-self/status")
	must(t, err)
	var all uint64
	_, bound, _ := strings.Cut(string(b), "CapBnd:")
	_, err = fmt.Sscanf(bound, "%x", &all)
	must(t, err)
	b, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	lines := strings.Split(string(b), "\n")
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		if want := fmt.Sprintf("%s:\t%016x", set, all&confined.Capabilities); !slices.Contains(lines, want) {
			t.Errorf("process %d: no line %q in\n%s", pid, want, b)
		}
	}
}

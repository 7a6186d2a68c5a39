package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// The worker of a volume dies while a pod writes. The pod sees no error, and an Event on its claim tells why it waited.
func TestWorkerDeath(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pvc("data", claim{})
	s.pod("writer", nil, "data")
	node := s.ready("writer").Spec.NodeName
	d := s.disk("writer", "data", claim{})
	sum := d.fill()
	d.startAppending()

	// The pattern does not match the script itself.
	kill := strings.ReplaceAll(`
for process in /proc/[0-9]*; do
	case $(cat $process/cmdline) in
	*[w]orker*VOLUME*) kill -9 ${process#/proc/} && echo killed ;;
	esac
done 2>/dev/null
`, "VOLUME", s.pv("data").Spec.CSI.VolumeHandle)
	engine := s.driverPod("engine", node)
	var next time.Time
	before := 0
	s.eventually("an Event of the death", func(ctx context.Context) error {
		// The plugin looks at the volumes every ten seconds; what happens before it has seen one is not told.
		if time.Now().After(next) {
			if out, err := s.execIn(system, engine, "engine", kill); err != nil || out != "killed" {
				return fmt.Errorf("the worker was not killed: %q, %w", out, err)
			}
			before = d.appended()
			next = time.Now().Add(15 * time.Second)
		}
		return s.hasEvent(ctx, "PersistentVolumeClaim", "data", "WorkerReplaced", "On node "+node)
	})
	written := 0
	s.eventually("the pod to write again", func(context.Context) error {
		if written = d.appended(); written <= before {
			return fmt.Errorf("it has written %d records, %d before", written, before)
		}
		return nil
	})
	d.stopAppending()
	d.verify(sum, written, d.appended())
}

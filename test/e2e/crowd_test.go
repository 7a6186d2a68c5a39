package e2e

import (
	"fmt"
	"testing"

	core "k8s.io/api/core/v1"
)

// 30 volumes and 60 snapshots are made at once, and removed at once. That nothing is left is what the end of the test,
// and of all tests, looks at.
func TestCrowd(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	all := nodes(s)
	const volumes = 30
	for i := range volumes {
		// As if a pod had been scheduled: so many pods would test the machine.
		s.pvc(fmt.Sprintf("data-%d", i), claim{size: "32Mi", tried: all[i%len(all)]})
	}
	for i := range volumes {
		s.bound(fmt.Sprintf("data-%d", i))
	}
	for i := range 2 * volumes {
		s.createSnapshot(fmt.Sprintf("snap-%d", i), fmt.Sprintf("data-%d", i/2))
	}
	for i := range 2 * volumes {
		s.snapshotReady(fmt.Sprintf("snap-%d", i))
	}
	s.deleteAll()
	s.nothingLeft()
}

// bound waits until a claim has its volume.
func (s *space) bound(name string) {
	s.Helper()
	s.eventuallyClaim(name, func(got *core.PersistentVolumeClaim) error {
		if got.Status.Phase != core.ClaimBound {
			return fmt.Errorf("it is %s", got.Status.Phase)
		}
		return nil
	})
}

package e2e

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A claim that does not fit in the node's pool waits, and events say why. When a snapshot is deleted it fits.
func fullPool(s *space, node string) {
	// What is promised to a volume is taken, written or not; with a snapshot, once more what it may overwrite.
	const room = 4 << 30
	s.pvc("ballast", claim{size: fmt.Sprint(s.capacity(node, room) - room), tried: node})
	s.bound("ballast")
	s.pvc("data", claim{size: "2Gi"})
	s.pod("writer", on(node), "data")
	s.ready("writer")
	s.exec("writer", "dd if=/dev/urandom of=/data/file bs=1M count=1000 2>/dev/null && sync")
	s.snapshot("snap", "data")
	s.deletePod("writer")
	s.deletePVC("data") // its snapshot still has what was written

	const size = "3300Mi"
	s.pvc("forced", claim{size: size, tried: node})
	s.event("PersistentVolumeClaim", "forced", "ProvisioningFailed", "do not fit in the pool")
	s.deletePVC("forced")
	s.capacityBelow(node, 3300<<20)
	s.pvc("late", claim{size: size})
	s.pod("late", on(node), "late")
	s.event("Pod", "late", "FailedScheduling", "did not have enough free storage")

	s.check(snapClient.SnapshotV1().VolumeSnapshots(s.name).Delete(s.ctx, "snap", meta.DeleteOptions{}))
	s.ready("late")
}

// capacity waits until a node offers more than least bytes to the class csi-qcow2, and returns how many.
func (s *space) capacity(node string, least int64) (bytes int64) {
	s.Helper()
	s.eventuallyCapacity(node, func(c resource.Quantity) error {
		if bytes = c.Value(); bytes <= least {
			return fmt.Errorf("it offers %s", c.String())
		}
		return nil
	})
	return bytes
}

func (s *space) capacityBelow(node string, most int64) {
	s.Helper()
	s.eventuallyCapacity(node, func(c resource.Quantity) error {
		if c.Value() >= most {
			return fmt.Errorf("it offers %s", c.String())
		}
		return nil
	})
}

// eventuallyCapacity waits until fn has no objection to what a node offers to the class csi-qcow2.
func (s *space) eventuallyCapacity(node string, fn func(resource.Quantity) error) {
	s.Helper()
	s.eventually("capacity of "+node, func(ctx context.Context) error {
		c, err := offered(ctx, node)
		if err != nil {
			return err
		}
		if c == nil {
			return errors.New("it is not known")
		}
		return fn(*c)
	})
}

// offered returns what a node offers to the class csi-qcow2, nil if nobody knows.
func offered(ctx context.Context, node string) (*resource.Quantity, error) {
	list, err := client.StorageV1().CSIStorageCapacities(system).List(ctx, meta.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, c := range list.Items {
		if c.StorageClassName == "csi-qcow2" && c.NodeTopology.MatchLabels["topology.qcow2.csi.dev/node"] == node {
			return c.Capacity, nil
		}
	}
	return nil, nil
}

package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TopologyKey is the node label under which a volume's node is known to the scheduler.
const TopologyKey = "topology.qcow2.csi.dev/node"

// topologySegment returns the label value for a node: its name, or a hash where the name is not a legal
// value (over 63 characters).
func topologySegment(nodeID string) string {
	legal := regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	if legal.MatchString(nodeID) {
		return nodeID
	}
	sum := sha256.Sum256([]byte(nodeID))
	return hex.EncodeToString(sum[:20])
}

// topology is where this node's volumes and snapshots can be used.
func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{TopologyKey: d.segment}}
}

// accessible tells whether a topology term includes this node.
func (d *Driver) accessible(t *csi.Topology) bool {
	for key, value := range t.GetSegments() {
		if key != TopologyKey || value != d.segment {
			return false
		}
	}
	return true
}

// checkTopology is RESOURCE_EXHAUSTED, which makes the provisioner ask for another node, if the
// requirements leave this one out.
func (d *Driver) checkTopology(r *csi.TopologyRequirement) error {
	requisite := r.GetRequisite()
	if len(requisite) == 0 || slices.ContainsFunc(requisite, d.accessible) {
		return nil
	}
	return refuse(errExhausted, "the accessibility requirements leave out this node, %s=%s", TopologyKey, d.segment)
}

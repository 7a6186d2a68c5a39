package pool

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// pending lists, in its note, the snapshots that were promised before they were whole.
const pending Marker = "pending"

// PendingSnapshot is a snapshot whose instant has passed and been answered with, while the image does not list it
// yet. When it never comes to be (its build was given up, or lost in a crash), this is what keeps the name from being
// given to the state of a later instant.
type PendingSnapshot struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
}

// PendingSnapshots returns a volume's, the image's own snapshots perhaps among them: those are whole. The caller needs no
// Lease. ErrNotFound, ErrBadID.
func (p *Pool) PendingSnapshots(id string) ([]PendingSnapshot, error) {
	note, set, err := p.Marked(id, pending)
	if err != nil || !set {
		return nil, err
	}
	var all []PendingSnapshot
	if err := json.Unmarshal(note, &all); err != nil {
		return nil, fmt.Errorf("volume %s: pending snapshots: %w", id, err)
	}
	return all, nil
}

// AddPendingSnapshot records one, durably. Nobody else may change the volume's records meanwhile. qcow2.ErrNoSpace.
func (p *Pool) AddPendingSnapshot(id string, s PendingSnapshot) error {
	return p.changePending(id, func(all []PendingSnapshot) []PendingSnapshot {
		return append(without(all, s.Name), s)
	})
}

// EndPendingSnapshot forgets one, durably; one that is not recorded is fine. Nobody else may change the volume's
// records meanwhile.
func (p *Pool) EndPendingSnapshot(id, name string) error {
	return p.changePending(id, func(all []PendingSnapshot) []PendingSnapshot { return without(all, name) })
}

func without(all []PendingSnapshot, name string) []PendingSnapshot {
	return slices.DeleteFunc(slices.Clone(all), func(s PendingSnapshot) bool { return s.Name == name })
}

func (p *Pool) changePending(id string, change func([]PendingSnapshot) []PendingSnapshot) error {
	all, err := p.PendingSnapshots(id)
	if err != nil {
		return err
	}
	changed := change(all)
	// Also without a change: one that was killed may have made it, and not synced it.
	if len(changed) == 0 {
		return p.Unmark(id, pending)
	}
	note, err := json.Marshal(changed)
	if err != nil {
		return err
	}
	if len(note) > noteLimit {
		return fmt.Errorf("volume %s: %w: %d snapshots that never came to be; delete them", id, qcow2.ErrLimit, len(all))
	}
	return p.Mark(id, pending, note)
}

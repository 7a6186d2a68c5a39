package fsck

import (
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// repairer is a running Repair.
type repairer struct {
	stop     func() error
	f        host.File
	kind     RepairKind
	progress func(done, total int64)
	phase    int64
	found    *checker // the check before the repair, nil if it could not be made
	result   RepairResult
}

// repairPhases is how often a repair walks the L2 tables at most: check, rebuild twice, check.
const repairPhases = 4

// nextPhase returns the progress of one more walk over the L2 tables.
func (r *repairer) nextPhase() func(done, total int64) {
	if r.progress == nil {
		return nil
	}
	phase := r.phase
	r.phase++
	return func(done, total int64) { r.progress(phase*total+done, repairPhases*total) }
}

// switchHeader makes h the live header. All that it selects has been written.
func (r *repairer) switchHeader(h format.Header) error {
	if err := r.f.Sync(); err != nil {
		return err
	}
	if _, err := r.f.WriteAt(h.Encode(), 0); err != nil {
		return fmt.Errorf("write the header: %w", err)
	}
	return r.f.Sync()
}

func (r *repairer) note(text string, args ...any) {
	if len(r.result.Mended) < maxProblems {
		r.result.Mended = append(r.result.Mended, fmt.Sprintf(text, args...))
	}
}

// lose notes that a reference to content was given up.
func (r *repairer) lose(text string, args ...any) {
	r.result.Lost++
	r.note(text, args...)
}

// isDamage tells whether what was read is wrong. What merely cannot be read just now must not be given up.
func isDamage(err error) bool {
	return errors.Is(err, format.ErrCorrupt) || errors.Is(err, format.ErrLimit)
}

// maxKnown bounds what isAllKnown reads, in bytes.
const maxKnown = 64 << 30

// isAllKnown tells whether everything in the file but zeros is in use: then no table that is missing has led to it.
func (r *repairer) isAllKnown() bool {
	c := r.found
	if c == nil || c.length > maxKnown {
		return false
	}
	b := make([]byte, c.g.ClusterSize)
	for cluster := range c.g.ClusterBehind(c.length) {
		if k, i := c.group(cluster); k.refs.get(i) > 0 {
			continue
		}
		if format.ReadPadded(r.f, b, c.g.Offset(cluster)) != nil || !format.OnlyZeros(b) {
			return false
		}
	}
	return true
}

// ErrNeedsRepair is that of package qcow2, which says when it is returned.
var ErrNeedsRepair = errors.New("the image needs a repair")

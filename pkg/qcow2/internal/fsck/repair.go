package fsck

import (
	"context"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// RepairKind says what Repair may change.
type RepairKind int

// The kinds of repairs.
const (
	RepairLeaks RepairKind = iota // give back clusters that are counted and not used
	RepairAll                     // and make all metadata consistent, whatever contradicts it
)

// RepairResult says what a repair found and what it has made of it.
type RepairResult struct {
	Found CheckResult // before; empty if FoundErr is not nil
	// FoundErr is why the image could not even be checked before, nil if it could.
	FoundErr error
	Left     CheckResult // afterwards
	Mended   []string    // what was changed, the first 1000: each says what and where
	Lost     int64       // references to content that were given up, for they led nowhere: it reads as zeros now
}

// Repair checks the image in f, which nobody else may use meanwhile, mends it as far as kind goes, and checks it again.
// A crash at any point leaves the image as it was or repaired. The dirty and the corrupt bit are cleared once no corruption
// is left. f is not closed.
//
// RepairAll keeps everything that can be read. It recounts all references, moves tables that share a cluster with
// something else, and gives up references that no image can have: behind the end of the file, not aligned, beyond what a
// count can hold. Snapshots whose L1 table is impossible are removed. ErrCorrupt, and nothing changed, for damage that leaves nothing to
// start from: the fixed part of the header, the place of the active L1 table.
//
// progress, if not nil, is called with an amount done and to do.
func Repair(ctx context.Context, f host.File, kind RepairKind, progress func(done, total int64)) (RepairResult, error) {
	r := &repairer{stop: ctx.Err, f: f, kind: kind, progress: progress}
	err := r.run()
	if err != nil {
		err = fmt.Errorf("repair %s: %w", f.Name(), err)
	}
	return r.result, err
}

func (r *repairer) run() error {
	h, err := format.ReadHeader(r.f, format.ParseHeader)
	if err != nil {
		return err
	}
	c, err := r.check(h)
	switch {
	case r.stop() != nil:
		return r.stop()
	case err == nil:
		r.result.Found, r.found = c.result, c
	case r.kind != RepairAll, !isDamage(err):
		return err
	default:
		r.result.FoundErr = err
	}
	switch found := r.result.Found; {
	case r.result.FoundErr != nil, found.Corruptions+found.Errors > 0 && r.kind == RepairAll:
		err = r.rebuild(h, false)
	case found.Leaks > 0 && found.Corruptions+found.Errors == 0 && c.leaksFlags():
		err = r.rebuild(h, true)
	case found.Leaks > 0:
		err = r.lowerCounts(c)
	}
	if err != nil {
		return err
	}
	return r.verify()
}

// check also returns what the check has learnt.
func (r *repairer) check(h format.Header) (*checker, error) {
	if err := h.Checkable(); err != nil {
		return nil, err
	}
	c, err := newChecker(r.stop, r.f, h, r.nextPhase())
	if err == nil {
		err = c.check()
	}
	return c, err
}

// verify checks what the repair has made of the image, and clears the bits that say that it needs one.
func (r *repairer) verify() error {
	h, err := format.ReadHeader(r.f, format.ParseHeader)
	if err != nil {
		return err
	}
	r.result.Left = r.result.Found
	if len(r.result.Mended) > 0 {
		r.phase = repairPhases - 1
		c, err := r.check(h)
		if err != nil {
			return err
		}
		r.result.Left = c.result
	}
	const bits = format.IncompatDirty | format.IncompatCorrupt
	if r.result.Left.Corruptions+r.result.Left.Errors > 0 {
		return nil
	}
	if h.Incompatible&bits != 0 {
		h.Incompatible &^= bits
		r.note("the dirty and the corrupt bit were cleared")
		if err := r.switchHeader(h); err != nil {
			return err
		}
	}
	if !host.Vouched(r.f) {
		host.Vouch(r.f)
	}
	return nil
}

// Recount makes the counts, and the COPIED flags that follow from them, right in an image whose writer postponed them.
// ErrCorrupt, and nothing changed, if more is wrong.
func Recount(f host.File, h format.Header) error {
	r := &repairer{stop: func() error { return nil }, f: f, kind: RepairAll}
	if err := r.rebuild(h, true); err != nil {
		return fmt.Errorf("rebuild the reference counts: %w", err)
	}
	return nil
}

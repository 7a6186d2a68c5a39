package qcow2

import (
	"context"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/fsck"
)

// CheckResult is the verdict on an image's metadata: `go doc ./pkg/qcow2/internal/fsck CheckResult`.
type CheckResult = fsck.CheckResult

// RepairKind says what Repair may change.
type RepairKind = fsck.RepairKind

// The kinds of repairs.
const (
	RepairLeaks = fsck.RepairLeaks // give back clusters that are counted and not used
	RepairAll   = fsck.RepairAll   // and make all metadata consistent, whatever contradicts it
)

// RepairResult says what a repair found and what it has made of it: `go doc ./pkg/qcow2/internal/fsck RepairResult`.
type RepairResult = fsck.RepairResult

// Check checks the image in f, which nobody may change meanwhile, also one that is too damaged to be opened. progress,
// if not nil, is called with the bytes of L2 tables done and to do. An error means that the image could not be checked.
func Check(ctx context.Context, f File, progress func(done, total int64)) (CheckResult, error) {
	return fsck.Check(ctx, f, progress)
}

// Check checks the image as it is on disk after a flush. Guest requests wait for it. progress, if not nil, is called
// with the bytes of L2 tables done and to do. An error means that it could not be checked.
func (img *Image) Check(ctx context.Context, progress func(done, total int64)) (CheckResult, error) {
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(false); err != nil {
		return CheckResult{}, err
	}
	if !img.readOnly {
		if err := img.commit(); err != nil {
			return CheckResult{}, err
		}
		img.background.Wait()
		if err := img.alloc.endReservation(); err != nil {
			return CheckResult{}, err
		}
	}
	return fsck.CheckImage(ctx, img.f, *img.hdr.Load(), progress)
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
func Repair(ctx context.Context, f File, kind RepairKind, progress func(done, total int64)) (RepairResult, error) {
	return fsck.Repair(ctx, f, kind, progress)
}

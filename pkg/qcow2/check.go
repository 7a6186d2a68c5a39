package qcow2

import (
	"context"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/fsck"
)

// CheckResult is the verdict on an image's metadata:
//
//	type CheckResult struct {
//		Errors      int64    // what could not be checked, for it cannot be read
//		Corruptions int64    // contradictions that endanger data
//		Leaks       int64    // clusters that are counted as used more often than they are: lost space, no danger
//		Problems    []string // the first 1000 of both, each says what and where
//		Clusters    int64    // guest clusters that the disk has
//		Allocated   int64    // those that the active state maps to host clusters
//		ImageEnd    int64    // file offset behind the last host cluster in use
//	}
//
//	func (r CheckResult) ExitStatus() int // as qemu-img check: 0 clean, 1 not all could be checked, 2 corrupt, 3 leaks only
type CheckResult = fsck.CheckResult

// RepairKind says what Repair may change: RepairLeaks or RepairAll.
type RepairKind = fsck.RepairKind

// The kinds of repairs.
const (
	RepairLeaks = fsck.RepairLeaks // give back clusters that are counted and not used
	RepairAll   = fsck.RepairAll   // and make all metadata consistent, whatever contradicts it
)

// RepairResult says what a repair found and what it has made of it:
//
//	type RepairResult struct {
//		Found    CheckResult // before; empty if FoundErr is not nil
//		FoundErr error       // why the image could not even be checked before, nil if it could
//		Left     CheckResult // afterwards
//		Mended   []string    // what was changed, the first 1000: each says what and where
//		Lost     int64       // references to content that were given up, for they led nowhere: it reads as zeros now
//	}
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

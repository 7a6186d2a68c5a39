// Package fsck checks images and repairs them: it counts what the mappings reference and holds that against the counts. It works on a
// file that nobody else changes, and knows nothing of an image that is open.
package fsck

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// CheckResult is the verdict on an image's metadata.
type CheckResult struct {
	Errors      int64    // what could not be checked, for it cannot be read
	Corruptions int64    // contradictions that endanger data
	Leaks       int64    // clusters that are counted as used more often than they are: lost space, no danger
	Problems    []string // the first 1000 of both, each says what and where
	Clusters    int64    // guest clusters that the disk has
	Allocated   int64    // those that the active state maps to host clusters
	ImageEnd    int64    // file offset behind the last host cluster in use
}

// maxProblems bounds CheckResult.Problems.
const maxProblems = 1000

// ExitStatus is what `qemu-img check` exits with for such an image: 0 clean, 1 not all could be checked, 2 corrupt, 3
// leaks only.
func (r CheckResult) ExitStatus() int {
	switch {
	case r.Errors > 0:
		return 1
	case r.Corruptions > 0:
		return 2
	case r.Leaks > 0:
		return 3
	}
	return 0
}

// Check checks the image in f, which nobody may change meanwhile, also one that is too damaged to be opened. progress,
// if not nil, is called with the bytes of L2 tables done and to do. An error means that the image could not be checked.
func Check(ctx context.Context, f host.File, progress func(done, total int64)) (CheckResult, error) {
	h, err := format.ReadHeader(f, format.ParseHeader)
	if err == nil {
		err = h.Checkable()
	}
	if err != nil {
		return CheckResult{}, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	return CheckImage(ctx, f, h, progress)
}

// CheckImage checks the image in f whose header is h. It only reads f, which must not change meanwhile.
// progress, when not nil, is called with the bytes of L2 tables done and to do. An error means that the
// image could not be checked: f cannot be read, ctx ended, or the snapshot table is beyond reading.
func CheckImage(ctx context.Context, f host.File, h format.Header, progress func(done, total int64)) (CheckResult, error) {
	c, err := newChecker(ctx.Err, f, h, progress)
	if err == nil {
		err = c.check()
	}
	if err != nil {
		return CheckResult{}, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	return c.result, nil
}

func (c *checker) check() error {
	// Everything that has one owner is marked first: what is found in L1 and L2 tables afterwards must
	// not lie in it.
	for _, step := range []func() error{
		c.markHeader, c.loadRefcounts, c.markSnapshotTable, c.markBitmaps, c.markL1Tables, c.walkL1Tables, c.walkL2Tables,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	c.compareRefcounts()
	return nil
}

func (c *checker) markHeader() error {
	c.reference(origin{use: useHeader}, 0, c.g.ClusterSize, 1)
	return nil
}

// markSnapshotTable also notes the L1 table of each snapshot.
func (c *checker) markSnapshotTable() error {
	c.l1 = append(c.l1, l1Region{offset: c.h.L1Offset, entries: c.h.L1Size, from: origin{use: useL1}})
	if c.h.Snapshots == 0 {
		return nil
	}
	rows, size, err := format.ScanSnapshotTable(c.file, c.h)
	switch {
	case errors.Is(err, format.ErrCorrupt):
		c.corrupt(1, "%v", err)
	case err != nil:
		return err
	}
	c.reference(origin{use: useSnapshotTable}, c.h.SnapshotsOffset, size, 1)
	for i := range rows {
		row := &rows[i]
		if c.h.Version >= 3 && row.ExtraSize < 16 {
			c.blemish(1, "snapshot table row %d (id %q, name %q) has %d bytes of extra data, at least 16 are due",
				i, row.ID, row.Name, row.ExtraSize)
		}
		if row.L1Offset < 0 && c.g.Aligned(row.L1Offset) && row.L1Size > 0 {
			c.result.Errors++ // like QEMU, which cannot read it
		}
		if err := row.Check(c.g); err != nil {
			c.corrupt(1, "snapshot table row %d (id %q, name %q): %v", i, row.ID, row.Name, err)
			continue
		}
		c.l1 = append(c.l1, l1Region{offset: row.L1Offset, entries: row.L1Size, from: origin{use: useSnapshotL1, table: row.L1Offset, index: int64(i)}})
	}
	return nil
}

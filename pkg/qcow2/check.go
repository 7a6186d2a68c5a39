package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	return checkImage(ctx, img.f, *img.hdr.Load(), progress)
}

// Check checks the image in f, which nobody may change meanwhile, also one that is too damaged to be opened. progress,
// if not nil, is called with the bytes of L2 tables done and to do. An error means that the image could not be checked.
func Check(ctx context.Context, f File, progress func(done, total int64)) (CheckResult, error) {
	h, err := readHeader(f, parseHeader)
	if err == nil {
		err = h.checkable()
	}
	if err != nil {
		return CheckResult{}, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	return checkImage(ctx, f, h, progress)
}

// checker recomputes from the mappings how often each host cluster is referenced and holds that against
// the counts in the image. It needs about a byte of memory per host cluster in use, reads each table once
// however many paths lead to it, and never follows a reference out of the file; so neither loops nor
// claims of size can make it work longer than the file is.
type checker struct {
	stop   func() error // says why to end early
	file   File
	h      *header
	g      geometry
	length int64 // of the file, rounded up to sectors

	clusterMap
	harmless  int64           // of the corruptions: whoever writes to the image destroys nothing for their sake
	worst     string          // the first of the others
	miscopied map[int64]int64 // offset and length of tables with COPIED on what is not counted once

	clusters int64               // host clusters: in the file, or the one behind it that a reference begins in
	l1       []l1Region          // L1 tables to walk, the active one first
	l2       []l2Region          // L2 tables found in them
	progress func(done, _ int64) // never nil
	result   CheckResult
}

// checkImage checks the image in f whose header is h. It only reads f, which must not change meanwhile.
// progress, when not nil, is called with the bytes of L2 tables done and to do. An error means that the
// image could not be checked: f cannot be read, ctx ended, or the snapshot table is beyond reading.
func checkImage(ctx context.Context, f File, h header, progress func(done, total int64)) (CheckResult, error) {
	c, err := newChecker(ctx.Err, f, h, progress)
	if err == nil {
		err = c.check()
	}
	if err != nil {
		return CheckResult{}, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	return c.result, nil
}

func newChecker(stop func() error, f File, h header, progress func(done, total int64)) (*checker, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if progress == nil {
		progress = func(_, _ int64) {}
	}
	c := &checker{
		stop: stop, file: f, h: &h, g: h.geometry(), progress: progress, clusterMap: newClusterMap(),
		miscopied: make(map[int64]int64),
		length:    (size + sectorSize - 1) &^ (sectorSize - 1),
	}
	c.clusters = c.g.clusters(c.length)
	c.result.Clusters = c.g.clusters(h.size)
	return c, nil
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
	c.reference(origin{use: useHeader}, 0, c.g.clusterSize, 1)
	return nil
}

// markSnapshotTable also notes the L1 table of each snapshot.
func (c *checker) markSnapshotTable() error {
	c.l1 = append(c.l1, l1Region{offset: c.h.l1Offset, entries: c.h.l1Size, from: origin{use: useL1}})
	if c.h.snapshots == 0 {
		return nil
	}
	rows, size, err := scanSnapshotTable(c.file, c.h)
	switch {
	case errors.Is(err, ErrCorrupt):
		c.corrupt(1, "%v", err)
	case err != nil:
		return err
	}
	c.reference(origin{use: useSnapshotTable}, c.h.snapshotsOffset, size, 1)
	for i := range rows {
		row := &rows[i]
		if c.h.version >= 3 && row.extraSize < 16 {
			c.blemish(1, "snapshot table row %d (id %q, name %q) has %d bytes of extra data, at least 16 are due",
				i, row.id, row.name, row.extraSize)
		}
		if row.l1Offset < 0 && c.g.aligned(row.l1Offset) && row.l1Size > 0 {
			c.result.Errors++ // like QEMU, which cannot read it
		}
		if err := row.check(c.g); err != nil {
			c.corrupt(1, "snapshot table row %d (id %q, name %q): %v", i, row.id, row.name, err)
			continue
		}
		c.l1 = append(c.l1, l1Region{offset: row.l1Offset, entries: row.l1Size, from: origin{use: useSnapshotL1, table: row.l1Offset, index: int64(i)}})
	}
	return nil
}

// corrupt notes a corruption that n paths lead to.
func (c *checker) corrupt(n int64, format string, args ...any) {
	if c.worst == "" {
		c.worst = fmt.Sprintf(format, args...)
	}
	c.result.Corruptions += n
	c.problem(format, args...)
}

// blemish notes a corruption that is harmless.
func (c *checker) blemish(n int64, format string, args ...any) {
	c.harmless += n
	c.result.Corruptions += n
	c.problem(format, args...)
}

// leak notes a leaked cluster.
func (c *checker) leak(format string, args ...any) {
	c.result.Leaks++
	c.problem(format, args...)
}

func (c *checker) problem(format string, args ...any) {
	if len(c.result.Problems) < maxProblems {
		c.result.Problems = append(c.result.Problems, fmt.Sprintf(format, args...))
	}
}

// readBytes is how much of a table is read at a time.
const readBytes = 1 << 20

// scan reads n bytes at off piece by piece and passes each piece, with its distance from off, to fn.
// Bytes behind the end of the file are zeros.
func (c *checker) scan(off, n int64, fn func(b []byte, at int64) error) error {
	buf := make([]byte, min(n, max(readBytes, c.g.clusterSize)))
	for at := int64(0); at < n; at += int64(len(buf)) {
		if err := c.stop(); err != nil {
			return err
		}
		buf = buf[:min(int64(len(buf)), n-at)]
		got, err := c.file.ReadAt(buf, off+at)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read at offset %#x: %w", off+at, err)
		}
		clear(buf[got:])
		if err := fn(buf, at); err != nil {
			return err
		}
	}
	return nil
}

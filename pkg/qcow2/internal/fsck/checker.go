package fsck

import (
	"errors"
	"fmt"
	"io"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// checker recomputes from the mappings how often each host cluster is referenced and holds that against
// the counts in the image. It needs about a byte of memory per host cluster in use, reads each table once
// however many paths lead to it, and never follows a reference out of the file; so neither loops nor
// claims of size can make it work longer than the file is.
type checker struct {
	stop   func() error // says why to end early
	file   host.File
	h      *format.Header
	g      format.Geometry
	length format.HostOffset // of the file, rounded up to sectors

	clusterMap
	harmless  int64                       // of the corruptions: whoever writes to the image destroys nothing for their sake
	worst     string                      // the first of the others
	miscopied map[format.HostOffset]int64 // offset and length of tables with COPIED on what is not counted once

	end      format.Cluster      // of the host clusters: of the file, or behind the one that a reference ends in
	l1       []l1Region          // L1 tables to walk, the active one first
	l2       []l2Region          // L2 tables found in them
	progress func(done, _ int64) // never nil
	result   CheckResult
}

func newChecker(stop func() error, f host.File, h format.Header, progress func(done, total int64)) (*checker, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if progress == nil {
		progress = func(_, _ int64) {}
	}
	c := &checker{
		stop: stop, file: f, h: &h, g: h.Geometry(), progress: progress, clusterMap: newClusterMap(),
		miscopied: make(map[format.HostOffset]int64),
		length:    format.HostOffset(format.RoundToSectors(size)),
	}
	c.end = c.g.ClusterBehind(c.length)
	c.result.Clusters = c.g.Clusters(h.Size)
	return c, nil
}

// corrupt notes a corruption that n paths lead to.
func (c *checker) corrupt(n int64, text string, args ...any) {
	if c.worst == "" {
		c.worst = fmt.Sprintf(text, args...)
	}
	c.result.Corruptions += n
	c.problem(text, args...)
}

// blemish notes a corruption that is harmless.
func (c *checker) blemish(n int64, text string, args ...any) {
	c.harmless += n
	c.result.Corruptions += n
	c.problem(text, args...)
}

// leak notes a leaked cluster.
func (c *checker) leak(text string, args ...any) {
	c.result.Leaks++
	c.problem(text, args...)
}

func (c *checker) problem(text string, args ...any) {
	if len(c.result.Problems) < maxProblems {
		c.result.Problems = append(c.result.Problems, fmt.Sprintf(text, args...))
	}
}

// readBytes is how much of a table is read at a time.
const readBytes = 1 << 20

// scan reads n bytes at off piece by piece and passes each piece, with its distance from off, to fn.
// Bytes behind the end of the file are zeros.
func (c *checker) scan(off format.HostOffset, n int64, fn func(b []byte, at int64) error) error {
	buf := make([]byte, min(n, max(readBytes, c.g.ClusterSize)))
	for at := int64(0); at < n; at += int64(len(buf)) {
		if err := c.stop(); err != nil {
			return err
		}
		buf = buf[:min(int64(len(buf)), n-at)]
		got, err := c.file.ReadAt(buf, int64(off)+at)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read at offset %#x: %w", off.Plus(at), err)
		}
		clear(buf[got:])
		if err := fn(buf, at); err != nil {
			return err
		}
	}
	return nil
}

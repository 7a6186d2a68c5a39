package qcow2

import (
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// WriteAt writes p to the active disk at off: all of it, or an error and how much came before. It is durable
// after the next Flush.
func (img *Image) WriteAt(p []byte, off int64) (int, error) {
	n, err := img.write(p, off)
	if err == nil {
		err = img.relieve()
	}
	return n, img.judge(err)
}

func (img *Image) write(p []byte, off int64) (int, error) {
	if err := img.begin(off, int64(len(p)), true); err != nil {
		return 0, err
	}
	defer img.end()
	done := 0
	err := img.g.Chunks(format.GuestOffset(off), int64(len(p)), func(c format.Chunk) error {
		err := img.writeChunk(c, p[done:done+int(c.N)])
		if err == nil {
			done += int(c.N)
		}
		return err
	})
	return done, err
}

func (img *Image) writeChunk(c format.Chunk, p []byte) error {
	if done, err := img.writeInPlace(c, p); done || err != nil {
		return err
	}
	unlock := img.lock(c, true)
	defer unlock()
	return img.withSpace(func() error { return img.writeMapping(c, p) })
}

// withSpace calls fn again when it met a full disk and what frees space has ended meanwhile: the release of what an
// answered flush has freed, or an operation on snapshots.
func (img *Image) withSpace(fn func() error) error {
	before, releasing := img.running()
	err := fn()
	n, still := img.running()
	if errors.Is(err, ErrNoSpace) && (releasing || still) {
		img.commitMu.Lock()
		img.commitMu.Unlock() //nolint:gocritic,staticcheck // to wait is all that it is for
		err = fn()
		n, _ = img.running()
	}
	if !errors.Is(err, ErrNoSpace) {
		return err
	}
	if n == nil {
		n = before // it has just ended, and given back what it had taken
	}
	if n == nil {
		return err
	}
	n.waitForSpace(err)
	return fn()
}

// running returns what may free space: the operation under way, if there is one, and whether clusters are being released.
func (img *Image) running() (n *generation, releasing bool) {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.build, img.releasing
}

// writeInPlace writes to clusters that the active state owns: the mapping stays as it is. It does nothing if one
// of them is not.
func (img *Image) writeInPlace(c format.Chunk, p []byte) (bool, error) {
	unlock := img.lock(c, !img.wholeBlocks(int64(c.Off), c.N))
	defer unlock()
	es, err := img.entries(c)
	if err != nil {
		return false, err
	}
	for i, e := range es {
		if mask := img.touched(c, i); !e.Own() || e.Sub&mask != mask {
			return false, nil
		}
	}
	return true, img.writeHosts(p, img.g.InCluster(c.Off), es)
}

// writeMapping writes a chunk that needs new clusters (W1): the data first, to clusters that nothing
// references, and then, in memory, the entries. Called with the chunk locked exclusively.
func (img *Image) writeMapping(c format.Chunk, p []byte) error {
	old, err := img.entries(c)
	if err != nil {
		return err
	}
	if err := img.ownTable(c.Table); err != nil {
		return err
	}
	es, got, err := img.newEntries(c, old)
	if err != nil {
		return err
	}
	data, in, err := img.fill(c, old, p)
	if err == nil {
		err = img.writeHosts(data, in, es)
	}
	if err == nil {
		err = img.setEntries(c, old, es, needsBarrier(old, es))
	}
	if err != nil {
		return img.giveBack(got, err)
	}
	return nil
}

// newEntries returns what the entries old become when data is written to them, and the clusters taken for it.
func (img *Image) newEntries(c format.Chunk, old []format.L2Entry) ([]format.L2Entry, format.Runs, error) {
	var need int64
	for _, e := range old {
		if !e.Own() {
			need++
		}
	}
	got, err := img.alloc.take(need)
	if err != nil {
		return nil, nil, err
	}
	es := make([]format.L2Entry, len(old))
	left := got
	next := format.Run{}
	for i, e := range old {
		sub := e.Sub.With(img.touched(c, i))
		if e.Own() {
			es[i] = format.L2Entry{Desc: e.Desc, Sub: sub}
			continue
		}
		if e.Kind() == format.KindCompressed {
			sub = format.SubAllocated
		}
		if next.N == 0 {
			next, left = left[0], left[1:]
		}
		es[i] = format.OwnEntry(img.g.Offset(next.First), sub)
		next = next.Behind(1)
	}
	return es, got, nil
}

// touched selects the subclusters of cluster i of c that c covers, in part or whole.
func (img *Image) touched(c format.Chunk, i int) format.SubBitmap {
	from, to := img.within(c, i)
	return img.g.SubMask(from, to)
}

// within returns the bytes of cluster i of c that c covers.
func (img *Image) within(c format.Chunk, i int) (from, to int64) {
	to = img.g.ClusterSize
	if i == 0 {
		from = img.g.InCluster(c.Off)
	}
	if int64(i) == c.Last-c.First {
		to = img.g.InCluster(c.End()-1) + 1
	}
	return from, to
}

// fill extends p, the guest's data for c, at both ends where the clusters there must hold more than it. in is where
// the result begins in the first cluster.
func (img *Image) fill(c format.Chunk, old []format.L2Entry, p []byte) (data []byte, in int64, err error) {
	last := len(old) - 1
	from, to := img.within(c, 0)
	in, _ = img.fillBounds(old[0], from, to)
	from, to = img.within(c, last)
	_, out := img.fillBounds(old[last], from, to)

	head, tail := img.g.InCluster(c.Off)-in, out-to
	if head == 0 && tail == 0 {
		return p, in, nil
	}
	data = make([]byte, head+int64(len(p))+tail)
	copy(data[head:], p)
	if err = img.readRun(data[:head], in, old[0]); err == nil {
		err = img.readRun(data[head+int64(len(p)):], to, old[last])
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%s: copy on write at guest offset %#x: %w", img.f.Name(), c.Off, err)
	}
	// A new cluster reads as zeros: they are not copied.
	if !old[last].Own() {
		data = data[:int64(len(data))-tail+format.Nonzero(data[int64(len(data))-tail:])]
	}
	if !old[0].Own() {
		zeros := format.LeadingZeros(data[:head])
		data, in = data[zeros:], in+zeros
	}
	return data, in, nil
}

// fillBounds returns which bytes of a cluster must be written so that the guest may write from to to. A new cluster
// reads as zeros, and takes over what e holds; one that is kept may have old content in the subclusters that
// hold no data so far.
func (img *Image) fillBounds(e format.L2Entry, from, to int64) (int64, int64) {
	switch {
	case e.Own():
		if e.Sub&img.g.SubMask(from, from+1) == 0 {
			from &^= img.g.SubSize - 1
		}
		if e.Sub&img.g.SubMask(to-1, to) == 0 {
			to = (to + img.g.SubSize - 1) &^ (img.g.SubSize - 1)
		}
		return from, to
	case e.Kind().ReadsZero():
		return from, to
	}
	return 0, img.g.ClusterSize
}

// needsBarrier tells whether the data must be durable before the mapping: unless each changed entry replaces
// what reads as zeros by a new cluster, which reads as zeros until the data is there.
func needsBarrier(old, es []format.L2Entry) bool {
	for i, e := range es {
		if e != old[i] && old[i].Kind() != format.KindUnallocated && old[i].Kind() != format.KindZero {
			return true
		}
	}
	return false
}

// writeHosts writes data, which begins in bytes into the first cluster of es, to host clusters: neighbours
// together.
func (img *Image) writeHosts(data []byte, in int64, es []format.L2Entry) error {
	for len(data) > 0 {
		k := 1
		for k < len(es) && es[k].Offset() == es[k-1].Offset().Plus(img.g.ClusterSize) {
			k++
		}
		if err := img.alloc.metadata.refuse(format.Run{First: img.g.Cluster(es[0].Offset()), N: int64(k)}); err != nil {
			return fmt.Errorf("%s: write data: %w", img.f.Name(), err)
		}
		if last := es[k-1].Offset(); last >= img.alloc.fileEnd() {
			return fmt.Errorf("%s: %w: data cluster at %#x, beyond the end of the file", img.f.Name(), ErrCorrupt, last)
		}
		n := min(img.g.Bytes(int64(k))-in, int64(len(data)))
		if _, err := img.f.WriteAt(data[:n], int64(es[0].Offset())+in); err != nil {
			return fmt.Errorf("%s: write data: %w", img.f.Name(), err)
		}
		data, es, in = data[n:], es[k:], 0
	}
	return nil
}

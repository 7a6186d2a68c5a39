package qcow2

import "fmt"

// WriteAt writes p to the active disk at off: all of it, or an error and how much came before. It is durable
// after the next Flush.
func (img *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := img.begin(off, int64(len(p)), true); err != nil {
		return 0, err
	}
	defer img.end()
	done := 0
	err := img.g.chunks(off, int64(len(p)), func(c chunk) error {
		err := img.writeChunk(c, p[done:done+int(c.n)])
		if err == nil {
			done += int(c.n)
		}
		return err
	})
	return done, err
}

func (img *Image) writeChunk(c chunk, p []byte) error {
	if done, err := img.writeInPlace(c, p); done || err != nil {
		return err
	}
	unlock := img.lock(c, true)
	defer unlock()
	if err := img.writeMapping(c, p); err != nil {
		return err
	}
	return img.relieve()
}

// writeInPlace writes to clusters that the active state owns: the mapping stays as it is. It does nothing if one
// of them is not.
func (img *Image) writeInPlace(c chunk, p []byte) (bool, error) {
	unlock := img.lock(c, false)
	defer unlock()
	es, err := img.entries(c)
	if err != nil {
		return false, err
	}
	for _, e := range es {
		if e.kind() != kindData || !e.own() {
			return false, nil
		}
	}
	return true, img.writeHosts(p, img.g.inCluster(c.off), es)
}

// writeMapping writes a chunk that needs new clusters (Spec A, W1): the data first, to clusters that nothing
// references, and then, in memory, the entries. Called with the chunk locked exclusively.
func (img *Image) writeMapping(c chunk, p []byte) error {
	old, err := img.entries(c)
	if err != nil {
		return err
	}
	if err := img.ownTable(c.table); err != nil {
		return err
	}
	es, got, err := img.newEntries(old)
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
func (img *Image) newEntries(old []l2Entry) ([]l2Entry, runs, error) {
	var need int64
	for _, e := range old {
		if !e.own() {
			need++
		}
	}
	got, err := img.alloc.take(need)
	if err != nil {
		return nil, nil, err
	}
	es := make([]l2Entry, len(old))
	left := got
	next := run{}
	for i, e := range old {
		if e.own() {
			es[i] = e &^ flagZero
			continue
		}
		if next.n == 0 {
			next, left = left[0], left[1:]
		}
		es[i] = l2Entry(next.first<<img.g.clusterBits) | flagCopied
		next = run{next.first + 1, next.n - 1}
	}
	return es, got, nil
}

// fill extends p, the guest's data for c, to the clusters' borders where the new clusters must hold more than it.
// in is where the result begins in the first cluster.
func (img *Image) fill(c chunk, old []l2Entry, p []byte) (data []byte, in int64, err error) {
	in = img.g.inCluster(c.off)
	tail := (img.g.clusterSize - img.g.inCluster(c.off+c.n)) & (img.g.clusterSize - 1)
	last := len(old) - 1
	if !needsFill(old[0]) {
		// A new cluster reads as zeros; an owned one holds the rest already.
		if last == 0 {
			return p, in, nil
		}
	} else if in > 0 {
		head := make([]byte, in, in+int64(len(p))+tail)
		if err := img.readRun(head, 0, old[0]); err != nil {
			return nil, 0, fmt.Errorf("%s: copy on write at guest offset %#x: %w", img.f.Name(), c.off, err)
		}
		p, in = append(head, p...), 0
	}
	if tail > 0 && needsFill(old[last]) {
		rest := make([]byte, tail)
		if err := img.readRun(rest, img.g.clusterSize-tail, old[last]); err != nil {
			return nil, 0, fmt.Errorf("%s: copy on write at guest offset %#x: %w", img.f.Name(), c.off+c.n, err)
		}
		p = append(p[:len(p):len(p)], rest...)
	}
	return p, in, nil
}

// needsFill tells whether a write to a part of a cluster must write the rest too: it has content elsewhere, or
// keeps a host cluster with content that must not show.
func needsFill(e l2Entry) bool {
	switch e.kind() {
	case kindZeroAlloc:
		return true
	case kindData:
		return !e.own()
	case kindCompressed:
		return true
	}
	return false
}

// needsBarrier tells whether the data must be durable before the mapping: unless each changed entry replaces
// what reads as zeros by a new cluster, which reads as zeros until the data is there.
func needsBarrier(old, es []l2Entry) bool {
	for i, e := range es {
		if e != old[i] && old[i].kind() != kindUnallocated && old[i].kind() != kindZero {
			return true
		}
	}
	return false
}

// writeHosts writes data, which begins in bytes into the first cluster of es, to host clusters: neighbours
// together.
func (img *Image) writeHosts(data []byte, in int64, es []l2Entry) error {
	for len(data) > 0 {
		k := 1
		for k < len(es) && es[k].offset() == es[k-1].offset()+img.g.clusterSize {
			k++
		}
		if err := img.guard(run{es[0].offset() >> img.g.clusterBits, int64(k)}); err != nil {
			return err
		}
		if last := es[k-1].offset(); last >= img.alloc.length.Load() {
			return fmt.Errorf("%s: %w: data cluster at %#x, beyond the end of the file", img.f.Name(), ErrCorrupt, last)
		}
		n := min(int64(k)<<img.g.clusterBits-in, int64(len(data)))
		if _, err := img.f.WriteAt(data[:n], es[0].offset()+in); err != nil {
			return fmt.Errorf("%s: write data: %w", img.f.Name(), err)
		}
		data, es, in = data[n:], es[k:], 0
	}
	return nil
}

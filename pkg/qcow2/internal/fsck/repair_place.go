package fsck

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// rebuild makes the next generation of a damaged image: what can be read stays where it is, and whatever has to change is
// written behind the end of the file, where one write of the header selects it. References are counted anew; the old
// refcount structures count for nothing and are never in the way. Neither is other metadata in the way of data: it moves.
type rebuild struct {
	*checker              // its refs are the counts of the next generation
	r           *repairer // to report to
	rows        []format.SnapshotRow
	rowsChanged bool
	first, next format.Cluster                          // clusters of the new structures: next begins the next one
	moved       map[format.HostOffset]format.HostOffset // where L2 tables have gone, by their old offset
	copied      int64                                   // bytes
	failure     error                                   // of a copy
}

// behindEnd tells whether an L1 table reaches behind the last cluster of the file. As QEMU has it, what it says there is nothing.
func (b *rebuild) behindEnd(l1 l1Region) bool {
	return l1.offset.Plus(l1.entries*8) > b.g.Offset(b.g.ClusterBehind(b.length))
}

// write puts content, padded to whole clusters, behind all else and returns its offset.
func (b *rebuild) write(use clusterUse, content []byte) (format.HostOffset, error) {
	if err := b.stop(); err != nil {
		return 0, err
	}
	n := max(b.g.Clusters(int64(len(content))), 1)
	padded := content
	if int64(len(content)) != b.g.Bytes(n) {
		padded = make([]byte, b.g.Bytes(n))
		copy(padded, content)
	}
	off := b.g.Offset(b.next)
	if _, err := b.file.WriteAt(padded, int64(off)); err != nil {
		return 0, fmt.Errorf("write %s: %w", use, err)
	}
	b.next += format.Cluster(n)
	return off, nil
}

// isNew tells whether the rebuild wrote what is at off: then it may be written again.
func (b *rebuild) isNew(off format.HostOffset) bool { return b.g.Cluster(off) >= b.first }

// occupy counts a structure of n bytes that is used times often. It returns false if something else is there.
func (b *rebuild) occupy(use clusterUse, off format.HostOffset, n, times int64) bool {
	r := b.g.RunOf(off, n)
	for cluster := r.First; cluster < r.End(); cluster++ {
		if k, i := b.group(cluster); k.refs.get(i) != 0 {
			return false
		}
	}
	for cluster := r.First; cluster < r.End(); cluster++ {
		k, i := b.group(cluster)
		k.refs.set(i, uint64(times))
		k.setUse(i, use)
	}
	return true
}

// vacate forgets the references to n bytes at off.
func (c *checker) vacate(off format.HostOffset, n int64) {
	r := c.g.RunOf(off, n)
	for cluster := r.First; cluster < r.End(); cluster++ {
		k, i := c.group(cluster)
		k.refs.set(i, 0)
		k.setUse(i, useNothing)
	}
}

package qcow2

import (
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// This file reads L2 tables in bulk (C4).

const (
	batchBytes  = 1 << 20 // of tables that are read together
	batchesRead = 4       // at a time, ahead of their use
)

// tableBatch is L2 tables that are read into one buffer.
type tableBatch struct {
	first, end int // L1 indexes; those of no table have no place in b
	b          []byte
	err        error
	done       chan struct{} // closed when b or err is there
}

// eachTable calls fn for each L2 table of an L1 table with its index, its offset and its content, in order. fn may change
// the content, which is valid until it returns. Several reads are under way at a time, and tables that lie one after
// the other are read together.
func (n *generation) eachTable(l1 []format.L1Entry, fn func(index int64, off format.HostOffset, t format.L2Table) error) error {
	img := n.img
	length, err := img.f.Size()
	if err != nil {
		return err
	}
	free := n.batchBuffers()
	var ahead []*tableBatch
	defer func() {
		for _, b := range ahead {
			<-b.done
		}
	}()
	for next := 0; ; {
		for next < len(l1) && len(free) > 0 {
			b := img.nextBatch(l1, next, free[0])
			free = free[1:]
			next = b.end
			ahead = append(ahead, b)
			go func() {
				defer close(b.done)
				b.err = img.readBatch(l1, b, length)
			}()
		}
		if len(ahead) == 0 {
			return nil
		}
		b := ahead[0]
		ahead = ahead[1:]
		<-b.done
		if b.err != nil {
			return b.err
		}
		at := int64(0)
		for i := b.first; i < b.end; i++ {
			off := l1[i].Offset()
			if off == 0 {
				continue
			}
			if err := fn(int64(i), off, img.g.Table(b.b[at:at+img.g.ClusterSize])); err != nil {
				return err
			}
			at += img.g.ClusterSize
		}
		free = append(free, b.b[:cap(b.b)])
		n.pace(int64(len(b.b)))
	}
}

// batchBuffers returns the buffers of all batches that are read at a time.
func (n *generation) batchBuffers() [][]byte {
	m, size := n.memory(), n.batchSize()
	bs := make([][]byte, batchesRead)
	for i := range bs {
		bs[i] = m[int64(i)*size:][:size:size]
	}
	return bs
}

func (n *generation) batchSize() int64 { return max(batchBytes, n.g.ClusterSize) }

// memory returns the memory of all batches, for what is done when none is read.
func (n *generation) memory() []byte {
	if n.buffer == nil {
		n.buffer = host.NewMemory(batchesRead * n.batchSize())
	}
	return n.buffer
}

// nextBatch plans a batch from an L1 index on, to be read into buf.
func (img *Image) nextBatch(l1 []format.L1Entry, first int, buf []byte) *tableBatch {
	b := &tableBatch{first: first, end: first, done: make(chan struct{})}
	size := 0
	for ; b.end < len(l1) && size < len(buf); b.end++ {
		if l1[b.end].Offset() != 0 {
			size += int(img.g.ClusterSize)
		}
	}
	b.b = buf[:size]
	return b
}

func (img *Image) readBatch(l1 []format.L1Entry, b *tableBatch, length int64) error {
	size := img.g.ClusterSize
	at := int64(0)
	for i := b.first; i < b.end; {
		off := l1[i].Offset()
		if off == 0 {
			i++
			continue
		}
		k := int64(0) // tables that lie one after the other
		for ; i < b.end && (l1[i].Offset() == off.Plus(k*size) || l1[i].Offset() == 0); i++ {
			if l1[i].Offset() == 0 {
				continue
			}
			if err := img.checkL1Entry(l1[i]); err != nil {
				return fmt.Errorf("L1 entry %d: %w", i, err)
			}
			if int64(l1[i].Offset()) >= length {
				return fmt.Errorf("%w: L1 entry %d points at %#x, beyond the end of the file", ErrCorrupt, i, l1[i].Offset())
			}
			k++
		}
		if err := format.ReadPadded(img.f, b.b[at:at+k*size], off); err != nil {
			return fmt.Errorf("read L2 tables at file offset %#x: %w", off, err)
		}
		at += k * size
	}
	return nil
}

package qcow2

import (
	"errors"
	"fmt"
)

// An operation that frees space must be possible on a file system that is full to its last byte, and writes new metadata
// before it frees the old. OpenOptions.MakeRoom gives back blocks that somebody has kept for that. They are taken at once, for
// the operation alone: all that it writes goes behind the end of the file, to blocks that are allocated there.

// changeInRoom is attempt with room of its own. cause is why it is needed.
func (img *Image) changeInRoom(op operation, cause error) error {
	allocator, ok := img.f.File.(Allocator)
	switch {
	case img.makeRoom != nil && ok:
	case op.unlist != nil:
		return img.changeInPlace(op, cause)
	default:
		return cause
	}
	op.takeRoom = func() (run, error) {
		if err := img.makeRoom(); err != nil {
			return run{}, errors.Join(cause, err)
		}
		img.alloc.mu.Lock()
		defer img.alloc.mu.Unlock()
		room := run{img.g.clusters(img.alloc.length.Load()), img.roomNeeded()}
		return room, allocator.Allocate(room.first<<img.g.clusterBits, room.n<<img.g.clusterBits)
	}
	err := img.attempt(op)
	img.alloc.ledger.Lock()
	defer img.alloc.ledger.Unlock()
	if img.failed() != nil {
		return err
	}
	return errors.Join(err, img.f.Truncate(img.alloc.length.Load())) // what was not used goes back
}

// roomNeeded returns how many clusters an operation that frees space may write: all active L2 tables, all refcount blocks
// and the tables that lead to them. Called with the allocator's lock held.
func (img *Image) roomNeeded() int64 {
	img.mu.Lock()
	defer img.mu.Unlock()
	need := img.g.clusters(int64(len(img.l1))*8) + img.g.clusters(img.rowBytes) + img.alloc.rc.tableAt.n
	for _, e := range img.l1 {
		if e.offset() != 0 {
			need++
		}
	}
	for _, off := range img.alloc.rc.table {
		if off != 0 {
			need++
		}
	}
	return need + need>>img.g.blockBits + 4 // new refcount blocks, for what is new
}

// waitForSpace is called when a guest's write has met a full disk while n is being built: it returns when a new attempt
// may find space. An operation that frees space is waited for, any other is given up.
func (n *generation) waitForSpace(full error) {
	if !n.frees {
		n.cancel(fmt.Errorf("given up for a guest's write: %w", full))
	}
	<-n.done
}

package qcow2

import (
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// Flush makes all completed writes durable. Flushes that come while one runs share the next. Of clusters that it frees many
// are released after it returns.
func (img *Image) Flush() error {
	if err := img.begin(0, 0, false); err != nil {
		return err
	}
	img.end() // the instant of a snapshot does not wait for syncs
	if img.readOnly {
		return nil
	}
	freed, err := img.commitAll()
	if err == nil && len(freed) > host.CallsAtOnce {
		img.setReleasing(true)
		img.commitMu.HandOver()
		go func() { // whoever takes commitMu next waits for its end, so Close does
			img.commitMu.Adopt()
			defer img.commitMu.Unlock()
			_ = img.retire(freed) // has failed the image, or found it corrupt: the next request tells
			img.setReleasing(false)
		}()
		return nil
	}
	defer img.commitMu.Unlock()
	return errors.Join(err, img.retire(freed))
}

// HasFreed tells whether clusters that guests have given up wait for the next flush.
func (img *Image) HasFreed() bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	return len(img.freed) > 0
}

func (img *Image) setReleasing(yes bool) {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.releasing = yes
}

// commit is Flush with all of its consequences.
func (img *Image) commit() error {
	freed, err := img.commitAll()
	defer img.commitMu.Unlock()
	return errors.Join(err, img.retire(freed))
}

// commitAll and retire are a guest flush. This one is of a write to a cluster that a snapshot shares, A, which went to B, a reserved
// one:
//
//	data goes to B; sync         a crash so far leaves A
//	L2 entry: B instead of A     either
//	sync                         from here on it leaves B
//	A is counted down
//
// Without the first sync the entry could be durable before the data: the disk would have neither. It is left out where B replaces
// zeros, for B reads as zeros until the data is there.

// commitAll is a guest flush (W2 and W3): one sync if no mapping changed or if each change can be seen in any order,
// two otherwise. It returns with commitMu held, and what is to be retired.
func (img *Image) commitAll() (freed format.Runs, err error) {
	img.mu.Lock()
	need := img.started + 1 // a commit that starts from now on covers all that came before
	img.mu.Unlock()

	img.commitMu.Lock()
	img.mu.Lock()
	done := img.completed >= need
	img.mu.Unlock()
	if done {
		return nil, img.failed()
	}
	w := img.takeDirty()
	err = w.write(img)
	img.endCommit(w, err)
	if err != nil {
		return nil, fmt.Errorf("%s: flush: %w", img.f.Name(), err)
	}
	return w.freed, nil
}

// retire releases what is durably no longer referenced. While an operation runs only the next generation gives it up, in
// its own time: the live one may still need it.
func (img *Image) retire(rs format.Runs) error {
	if len(rs) == 0 {
		return nil
	}
	img.mu.Lock()
	n := img.build
	if n != nil {
		n.deferred = append(n.deferred, rs...)
	}
	img.mu.Unlock()
	if n != nil || img.corrupt.Load() != nil { // what a damaged image says is free may be in use
		return nil
	}
	err := img.alloc.release(rs)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return img.fail(err)
	}
	return img.judge(err)
}

// commitMapping makes the mapping durable, and with it all data if there is anything in it to commit. A commit that is under
// way has ended then: what is on disk is the mapping.
func (img *Image) commitMapping() error {
	img.commitMu.Lock()
	img.mu.Lock()
	clean := img.dirty == 0 && len(img.preserved) == 0 && img.l1Dirty.Empty() && len(img.freed) == 0
	img.mu.Unlock()
	img.commitMu.Unlock()
	if clean {
		return img.failed()
	}
	return img.commit()
}

// relieve commits when much of the L2 cache is dirty, for dirty tables cannot be dropped from it: in the background when
// half of it is, and the guest waits for it when all is.
func (img *Image) relieve() error {
	img.mu.Lock()
	full := img.dirty >= img.l2.limit
	begin := img.dirty*2 > img.l2.limit && !full && !img.relieving
	img.relieving = img.relieving || begin
	img.mu.Unlock()
	switch {
	case full:
		return img.commit()
	case begin && img.begin(0, 0, true) == nil:
		defer img.end()
		img.background.Go(func() {
			_ = img.commit() // what was not written is dirty still: the next flush tells
			img.mu.Lock()
			img.relieving = false
			img.mu.Unlock()
		})
	}
	return nil
}

// commitWork is what one commit writes.
type commitWork struct {
	number    uint64
	barrier   bool
	freed     format.Runs
	tables    []*l2Table
	l1Dirty   format.SectorSet
	preserved []format.MetaWrite // see Image.preserved: they come first
	writes    []format.MetaWrite
	redo      uint64 // end of the redo log: what was noted before is in the above
}

// takeDirty collects what has changed; what changes from now on is the next commit's.
func (img *Image) takeDirty() *commitWork {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.started++
	w := &commitWork{number: img.started, barrier: img.barrier, freed: img.freed, l1Dirty: img.l1Dirty, preserved: img.preserved}
	w.redo = img.redo.end()
	img.barrier, img.freed, img.l1Dirty, img.dirty, img.preserved = false, nil, nil, 0, nil
	for _, e := range img.l2.tables {
		t := e.Value.(*l2Table)
		if t.dirty.Empty() {
			continue
		}
		t.writing, t.dirty = t.dirty, nil
		w.tables = append(w.tables, t)
		w.writes = append(w.writes, t.writing.Parts(t.data.B, t.offset)...)
	}
	w.l1Dirty.Each(func(first, n int64) {
		const perSector = format.SectorSize / 8
		from, to := first*perSector, min((first+n)*perSector, int64(len(img.l1)))
		w.writes = append(w.writes, format.MetaWrite{Off: img.hdr.Load().L1Offset.Plus(from * 8), B: format.EncodeL1(img.l1[from:to])})
	})
	return w
}

// preserve notes what tables hold that is not yet on disk, for the next commit: guests will change copies of them, and the
// tables themselves are a snapshot's. Called with mu held, while guests are stopped.
func (img *Image) preserve() {
	for _, e := range img.l2.tables {
		t := e.Value.(*l2Table)
		var pending format.SectorSet
		pending.AddAll(t.dirty)
		pending.AddAll(t.writing) // the commit under way may fail
		img.preserved = append(img.preserved, pending.Parts(t.data.B, t.offset)...)
	}
}

func (w *commitWork) write(img *Image) error {
	if w.barrier {
		if err := img.sync(); err != nil {
			return err
		}
	}
	for _, ws := range [][]format.MetaWrite{w.preserved, w.writes} {
		if err := host.WriteAll(img.f, ws); err != nil {
			return fmt.Errorf("write metadata: %w", err)
		}
	}
	return img.sync()
}

// endCommit ends the commit in memory. What a failed one took is dirty again: nothing is lost, and a later flush
// may succeed where a full disk has been relieved. It owes its barrier, too: that may be what has failed.
func (img *Image) endCommit(w *commitWork, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	if err == nil {
		img.completed = w.number
		img.redo.forget(w.redo)
	} else {
		img.barrier = true
		img.freed = append(w.freed, img.freed...)
		img.preserved = append(w.preserved, img.preserved...)
		img.l1Dirty.AddAll(w.l1Dirty)
	}
	for _, t := range w.tables {
		if err != nil {
			t.dirty.AddAll(t.writing)
			img.dirty++
		}
		t.writing = nil
	}
}

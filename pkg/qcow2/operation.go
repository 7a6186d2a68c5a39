package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// operation is a change of the metadata's generation: a snapshot created, deleted or gone to, a resize.
type operation struct {
	// prepare, if not nil, changes the active disk before the operation begins, as a guest does.
	prepare func() error
	// begin checks the request and notes what it wants. Guest requests wait for it, all that came before is
	// committed; it reads nothing.
	begin func(n *generation) error
	// build prepares the next generation; it may take long. Guests go on, unless they have to stop.
	build func(n *generation) error
	// stop: guests wait until the operation has ended.
	stop bool
	// frees: it gives more space than it takes.
	frees bool
	// takeRoom, if not nil, makes room on a full file system, and returns it. Guests wait.
	takeRoom func() (format.Run, error)
	// unlist, if not nil, is what there is room for on a full file system of which nobody keeps any; it makes room for build.
	// Guests wait.
	unlist func() error
}

// nothing is a begin that has nothing to check.
func nothing(*generation) error { return nil }

// change carries out an operation, which ctx can end until the header is about to be written. If it fails before that nothing has
// changed; if it fails there the image has failed.
func (img *Image) change(ctx context.Context, op operation) (err error) {
	defer func() { err = img.judge(err) }()
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	defer img.phases.enter("")
	err = img.attempt(ctx, op)
	if op.frees && errors.Is(err, ErrNoSpace) && img.failed() == nil {
		err = img.changeInRoom(ctx, op, err)
	}
	return err
}

func (img *Image) attempt(ctx context.Context, op operation) error {
	img.phases.enter(PhasePrepare)
	if err := ctx.Err(); err != nil {
		return err
	}
	if op.prepare != nil {
		if err := op.prepare(); err != nil {
			return err
		}
	}
	if op.takeRoom == nil { // else the commit may need it, too
		if err := img.commitBeforehand(); err != nil {
			return err
		}
	}
	n, err := img.start(op)
	if err != nil {
		return err
	}
	defer close(n.done)
	defer context.AfterFunc(ctx, func() { n.cancel(context.Cause(ctx)) })()
	if op.stop {
		defer img.gate.Unlock()
	}
	img.phases.enter(PhaseBuild)
	if err := op.build(n); err != nil {
		return n.abort(err)
	}
	if !op.stop {
		img.phases.enter(PhaseCatchUp)
		if err := n.catchUp(); err != nil {
			return n.abort(err)
		}
	}
	if err := n.finish(); err != nil {
		return err
	}
	img.phases.enter(PhasePunch)
	n.punchZeroed()
	return nil
}

// commitBeforehand commits, so that little is left to be committed when the operation begins, and reserves clusters for guests.
func (img *Image) commitBeforehand() error {
	img.gate.RLock() // as a guest's request, but for the count of those
	err := img.usable(true)
	img.gate.RUnlock()
	if err != nil {
		return err
	}
	if img.requests.Load() > 0 {
		if err := img.alloc.reserve(batch(img.g, beforeBuildBytes)); err != nil {
			return err
		}
	}
	return img.commitMapping()
}

// start begins a generation at an instant at which no guest request is under way, and commits what came before. Guests
// stop for the instant only, which waits for no sync, unless the operation wants them to.
func (img *Image) start(op operation) (*generation, error) {
	slab := host.NewMemory(slabBytes)
	if img.requests.Load() > 0 {
		host.Populate(slab)
	}
	n, err := img.beginGeneration(op, slab)
	if err != nil || op.stop {
		return n, err
	}
	img.phases.enter(PhaseCommit)
	if err := img.commitMapping(); err != nil { // what it preserves; finish syncs the data
		err = n.abort(err)
		close(n.done)
		return nil, err
	}
	return n, nil
}

// beginGeneration stops guests and begins a generation, which gets slab.
func (img *Image) beginGeneration(op operation, slab []byte) (*generation, error) {
	img.phases.enter(PhaseDrain)
	img.gate.Lock()
	img.phases.enter(PhaseCut)
	ok := false
	defer func() {
		if !ok || !op.stop {
			img.gate.Unlock()
		}
	}()
	if err := img.usable(true); err != nil {
		return nil, err
	}
	var room format.Run
	if op.takeRoom != nil {
		var err error
		if room, err = op.takeRoom(); err != nil {
			return nil, err
		}
	}
	if op.stop {
		if err := img.commitMapping(); err != nil {
			return nil, err // data may wait for the sync before the switch
		}
	}
	n := img.newGeneration()
	n.slab = slab
	if n.frees, n.room = op.frees, room; room.N > 0 {
		n.next = room.First
	}
	if err := op.begin(n); err != nil {
		return nil, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	ok = true
	img.mu.Lock()
	if img.build = n; n.sharesAll {
		img.preserve()
	}
	img.mu.Unlock()
	img.alloc.mu.Lock()
	img.alloc.build = n
	if img.alloc.leakSearch != nil {
		img.alloc.leakSearch.disturbed = true
	}
	img.alloc.mu.Unlock()
	return n, nil
}

// An operation that frees space must be possible on a file system that is full to its last byte, and writes new metadata
// before it frees the old. OpenOptions.MakeRoom gives back blocks that somebody has kept for that. They are taken at once, for
// the operation alone: all that it writes goes behind the end of the file, to blocks that are allocated there.

// changeInRoom is attempt with room of its own. cause is why it is needed.
func (img *Image) changeInRoom(ctx context.Context, op operation, cause error) error {
	allocator, ok := img.f.File.(Allocator)
	switch {
	case img.makeRoom != nil && ok:
	case op.unlist != nil:
		return img.changeInPlace(ctx, op, cause)
	default:
		return cause
	}
	op.takeRoom = func() (format.Run, error) {
		if err := img.makeRoom(); err != nil {
			return format.Run{}, errors.Join(cause, err)
		}
		img.alloc.mu.Lock()
		defer img.alloc.mu.Unlock()
		room := format.Run{First: img.g.ClusterBehind(img.alloc.fileEnd()), N: img.deletionRoom()}
		return room, allocator.Allocate(int64(img.g.Offset(room.First)), img.g.Bytes(room.N))
	}
	err := img.attempt(ctx, op)
	img.alloc.ledger.Lock()
	defer img.alloc.ledger.Unlock()
	if img.failed() != nil {
		return err
	}
	return errors.Join(err, img.f.Truncate(img.alloc.length.Load())) // what was not used goes back
}

// changeInPlace is attempt after unlist. cause is why it is needed.
func (img *Image) changeInPlace(ctx context.Context, op operation, cause error) error {
	gone := false
	op.takeRoom = func() (format.Run, error) {
		err := op.unlist()
		if gone = err == nil; !gone {
			err = errors.Join(cause, err)
		}
		return format.Run{}, err
	}
	op.begin = nothing
	err := img.attempt(ctx, op)
	if !gone || !errors.Is(err, ErrNoSpace) || img.failed() != nil {
		return err
	}
	// There is no room for new tables of the active disk. What it shared with the snapshot stays counted twice, and what guests
	// change meanwhile is leaked until the next search.
	_, err = img.ReclaimLeaks(ctx)
	return err
}

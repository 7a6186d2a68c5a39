package qcow2

import "fmt"

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
}

// change carries out an operation. If it fails before the header is written nothing has changed; if it fails there
// the image has failed.
func (img *Image) change(op operation) (err error) {
	defer func() { err = img.judge(err) }()
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	if op.prepare != nil {
		if err := op.prepare(); err != nil {
			return err
		}
	}
	if err := img.settleFirst(); err != nil {
		return err
	}
	n, err := img.start(op)
	if err != nil {
		return err
	}
	defer close(n.done)
	if op.stop {
		defer img.gate.Unlock()
	}
	if err := op.build(n); err != nil {
		return n.abort(err)
	}
	if !op.stop {
		if err := n.catchUp(); err != nil {
			return n.abort(err)
		}
	}
	if err := n.finish(); err != nil {
		return err
	}
	n.punchZeroed()
	return nil
}

// settleFirst commits, so that start, for which guests stop, has little to commit.
func (img *Image) settleFirst() error {
	if err := img.begin(0, 0, true); err != nil {
		return err
	}
	defer img.end()
	return img.commitMapping()
}

// start stops guests, commits and begins a generation. It keeps them stopped only for an operation that wants it.
func (img *Image) start(op operation) (*generation, error) {
	img.gate.Lock()
	ok := false
	defer func() {
		if !ok || !op.stop {
			img.gate.Unlock()
		}
	}()
	if err := img.usable(true); err != nil {
		return nil, err
	}
	if err := img.commitMapping(); err != nil {
		return nil, err // data may wait for the sync before the switch
	}
	n := img.newGeneration()
	if err := op.begin(n); err != nil {
		return nil, fmt.Errorf("%s: %w", img.f.Name(), err)
	}
	ok = true
	img.mu.Lock()
	img.build = n
	img.mu.Unlock()
	img.alloc.mu.Lock()
	img.alloc.build = n
	if img.alloc.search != nil {
		img.alloc.search.disturbed = true
	}
	img.alloc.mu.Unlock()
	return n, nil
}

const (
	catchUpRounds = 8
	fewTables     = 16
)

// catchUp writes most of what finish would have to write while guests wait for their flushes: refcount blocks, and
// what guests have changed meanwhile.
func (n *generation) catchUp() error {
	for range catchUpRounds {
		n.img.mu.Lock()
		cs := n.changes()
		n.img.mu.Unlock()
		for _, c := range cs {
			if err := n.apply(c); err != nil {
				return err
			}
		}
		for _, step := range []func() error{n.placeBlocks, n.writeBlocks, n.out.flush, n.img.sync} {
			if err := step(); err != nil {
				return err
			}
		}
		if len(cs) <= fewTables {
			break
		}
	}
	return nil
}

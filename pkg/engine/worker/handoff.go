package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
)

// HolderPatience is how long a holder may take to answer: one may be taking over from another.
const HolderPatience = 10 * time.Second

// keptState says what the holder has of an attached volume, in JSON. The descriptors are the redo log's memory, and then
// the device's.
type keptState struct {
	Version int             `json:"version"`
	Device  json.RawMessage `json:"device"`
}

const keptVersion = 1

// keep gives the holder what a next worker needs to go on with the volume.
func keep(ctx context.Context, at holder.Client, volume string, dev *blockdev.Device, log *redoMemory) error {
	h, err := dev.Handle()
	if err != nil {
		return err
	}
	state, err := json.Marshal(keptState{keptVersion, h.State})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, HolderPatience)
	defer cancel()
	return at.Hold(ctx, volume, holder.Entry{State: state, FDs: append([]int{log.fd}, h.FDs...)})
}

// loopEntry is the holder's name for the descriptor that keeps a volume's loop device bound. It is an entry of its own so that it
// can be given up when the device is to go, and for engines of before that did not keep it: they go on with the rest. (They
// cannot detach such a volume.)
func loopEntry(volume string) string { return volume + "/loop" }

// keepLoop has the holder keep the loop device's descriptor; -1: give it up.
func keepLoop(ctx context.Context, at holder.Client, volume string, fd int) error {
	ctx, cancel := context.WithTimeout(ctx, HolderPatience)
	defer cancel()
	if fd < 0 {
		return at.Drop(ctx, loopEntry(volume))
	}
	e := holder.Entry{FDs: []int{fd}, Last: true}
	if at.Hold(ctx, loopEntry(volume), e) == nil {
		return nil
	}
	// It may have that of an earlier device.
	if err := at.Drop(ctx, loopEntry(volume)); err != nil {
		return err
	}
	return at.Hold(ctx, loopEntry(volume), e)
}

// drop makes the holder give up all that it has of a volume.
func drop(ctx context.Context, at holder.Client, volume string) error {
	ctx, cancel := context.WithTimeout(ctx, HolderPatience)
	defer cancel()
	return errors.Join(at.Drop(ctx, volume), at.Drop(ctx, loopEntry(volume)))
}

// kept is what an earlier worker has left.
type kept struct {
	device blockdev.Handle
	log    *redoMemory
}

// getKept returns what the holder has of a volume, nil if nothing.
func getKept(ctx context.Context, at holder.Client, volume string) (*kept, error) {
	ctx, cancel := context.WithTimeout(ctx, HolderPatience)
	defer cancel()
	e, err := at.Get(ctx, volume)
	if errors.Is(err, holder.ErrNotHeld) {
		return nil, nil //nolint:nilnil // nothing is kept
	}
	if err != nil {
		return nil, err
	}
	k, err := openKept(e)
	if err != nil {
		e.Close()
		return nil, fmt.Errorf("what is held of %s: %w", volume, err)
	}
	loop, err := at.Get(ctx, loopEntry(volume))
	switch {
	case errors.Is(err, holder.ErrNotHeld): // an engine of before has attached it
	case err != nil:
		k.close()
		return nil, err
	case len(loop.FDs) == 1:
		k.device.Loop = loop.FDs[0]
	default:
		loop.Close()
	}
	return k, nil
}

func openKept(e holder.Entry) (*kept, error) {
	var s keptState
	if err := json.Unmarshal(e.State, &s); err != nil {
		return nil, err
	}
	if s.Version != keptVersion || len(e.FDs) < 2 {
		return nil, fmt.Errorf("version %d with %d descriptors", s.Version, len(e.FDs))
	}
	log, err := mapRedoMemory(e.FDs[0])
	if err != nil {
		return nil, err
	}
	return &kept{device: blockdev.Handle{State: s.Device, FDs: e.FDs[1:]}, log: log}, nil
}

func (k *kept) close() {
	k.device.Close()
	k.log.close()
}

// Discard ends a kept device, whoever uses it: they get errors. Nothing kept is fine.
func Discard(ctx context.Context, at holder.Client, volume string) error {
	k, err := getKept(ctx, at, volume)
	if err == nil && k != nil {
		err = k.device.Abort()
		k.close()
	}
	return errors.Join(err, drop(ctx, at, volume))
}

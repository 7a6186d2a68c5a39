package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/holder"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// holderPatience is how long a holder may take to answer: one may be taking over from another.
const holderPatience = 10 * time.Second

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
	ctx, cancel := context.WithTimeout(ctx, holderPatience)
	defer cancel()
	return at.Hold(ctx, volume, holder.Entry{State: state, FDs: append([]int{log.fd}, h.FDs...)})
}

// loopEntry is the holder's name for the descriptor that keeps a volume's loop device bound. It is an entry of its own so that it
// can be given up when the device is to go, and for engines of before that did not keep it: they go on with the rest. (They
// cannot detach such a volume.)
func loopEntry(volume string) string { return volume + "/loop" }

// keepLoop has the holder keep the loop device's descriptor; -1: give it up.
func keepLoop(ctx context.Context, at holder.Client, volume string, fd int) error {
	ctx, cancel := context.WithTimeout(ctx, holderPatience)
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
	ctx, cancel := context.WithTimeout(ctx, holderPatience)
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
	ctx, cancel := context.WithTimeout(ctx, holderPatience)
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

// discard ends a kept device, whoever uses it: they get errors. Nothing kept is fine.
func discard(ctx context.Context, at holder.Client, volume string) error {
	k, err := getKept(ctx, at, volume)
	if err == nil && k != nil {
		err = k.device.Abort()
		k.close()
	}
	return errors.Join(err, drop(ctx, at, volume))
}

// redoMemory is the memory of an image's redo log, shared by all who have its descriptor.
type redoMemory struct {
	fd int
	b  []byte
}

// redoMemorySize in bytes: twice the least.
const redoMemorySize = 2 * 8 * qcow2.MinRedoLog

func newRedoMemory() (*redoMemory, error) {
	fd, err := unix.MemfdCreate("csi-qcow2 redo log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	if err := unix.Ftruncate(fd, redoMemorySize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	m, err := mapRedoMemory(fd)
	if err != nil {
		unix.Close(fd)
	}
	return m, err
}

// mapRedoMemory takes over fd when it succeeds.
func mapRedoMemory(fd int) (*redoMemory, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("memory of the redo log: %w", err)
	}
	if st.Size <= 0 || st.Size > 1<<30 || st.Size%8 != 0 {
		return nil, fmt.Errorf("memory of the redo log has %d bytes", st.Size)
	}
	b, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the redo log: %w", err)
	}
	return &redoMemory{fd, b}, nil
}

// log returns the log that is in the memory.
func (m *redoMemory) log() (*qcow2.RedoLog, error) {
	return qcow2.NewRedoLog(unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(m.b))), len(m.b)/8))
}

// close gives up the memory. No image may use its log.
func (m *redoMemory) close() {
	_ = unix.Munmap(m.b)
	unix.Close(m.fd)
}

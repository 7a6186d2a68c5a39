package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	// clearPatience is how long it may take to remove a dead device.
	clearPatience = 10 * time.Second
)

// devicesLeft returns the volumes of p that have a device, and its path.
func devicesLeft(p *pool.Pool) map[string]string {
	devices, err := blockdev.Bound(worker.DevicePrefix)
	if err != nil {
		klog.ErrorS(err, "Cannot look for devices of an earlier engine")
	}
	left := map[string]string{}
	for name, device := range devices {
		id := strings.TrimPrefix(name, worker.DevicePrefix)
		if p.Owns(id) { // else another engine's
			left[id] = device
		}
	}
	return left
}

// recoverPool takes up what an earlier engine has left: volumes that are held get a worker, file systems that it had frozen are
// thawed, devices that nobody serves any more are removed. Only for the last it waits; those that stay are listed with the
// reason, and so are those that users of their volume may still have.
func (s *supervisor) recoverPool(ctx context.Context, p *pool.Pool, held map[string]bool, patience time.Duration) {
	left := devicesLeft(p)
	waiting, dead := map[string]*attachment{}, map[string]string{}
	for id, device := range left {
		device = s.devices.present(id, device)
		if held[id] {
			waiting[id] = &attachment{device: device, failure: "an earlier engine has ended", waiting: true}
			s.set(id, waiting[id])
			s.endEarlierFreeze(p, id, device)
		} else {
			dead[id] = device
		}
	}
	for id, device := range s.devices.without(left) {
		klog.ErrorS(errUnbound, "Volume failed", "volume", id, "device", device)
		s.set(id, &attachment{device: device, failure: errUnbound.Error()})
	}
	s.resume(waiting)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var clearing sync.WaitGroup
	for id, device := range dead {
		clearing.Go(func() {
			err := waitForOrphan(ctx, p, id)
			switch {
			case err != nil:
			case s.devices.count(id) > 0:
				s.thawDead(ctx, p, id, device)
				err = errServerDied
			default:
				err = s.clearDevices(ctx, p, id)
			}
			if err != nil {
				klog.ErrorS(err, "Device of an earlier engine stays", "volume", id, "device", device)
				s.set(id, &attachment{device: device, failure: err.Error()})
				return
			}
			klog.InfoS("Removed a device of an earlier engine", "volume", id, "device", device)
		})
	}
	clearing.Wait()
	removeMarkers(p, left)
}

var (
	errServerDied = errors.New("all that served its device has died")
	errUnbound    = errors.New("all that served its device has died, and somebody has unbound it")
)

// waitForOrphan waits until no worker of a dead engine holds the volume.
func waitForOrphan(ctx context.Context, p *pool.Pool, id string) error {
	tick := time.NewTicker(worker.OrphanPoll)
	defer tick.Stop()
	for {
		lease, err := p.Lock(id)
		switch {
		case err == nil:
			return lease.Unlock()
		case !errors.Is(err, pool.ErrInUse):
			return nil // the volume is gone; its device may go too
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the worker of an earlier engine does not end: %w", err)
		case <-tick.C:
		}
	}
}

// clearDevices removes the devices of a volume that no worker serves any more, having thawed a file system that is frozen on
// them. ErrInUse if one is still open; the kernel removes that one when its last user closes it.
func (s *supervisor) clearDevices(ctx context.Context, p *pool.Pool, id string) error {
	devices, err := blockdev.Bound(worker.DevicePrefix + id)
	if err != nil {
		return fmt.Errorf("find the devices of %s: %w", id, err)
	}
	device, bound := devices[worker.DevicePrefix+id]
	if !bound {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, clearPatience)
	defer cancel()
	s.thawDead(ctx, p, id, s.devices.present(id, device))
	return helper.Ask(ctx, helper.Request{Op: helper.Clear, Device: worker.DevicePrefix + id})
}

// thawDead thaws the file system on a device that nobody serves any more, if an earlier engine had frozen it.
func (s *supervisor) thawDead(ctx context.Context, p *pool.Pool, id, device string) {
	ctx, cancel := context.WithTimeout(ctx, clearPatience)
	defer cancel()
	marked, err := frozenBefore(p, id)
	if err == nil && marked == device {
		if err = helper.Ask(ctx, helper.Request{Op: helper.ThawDevice, Device: device, Surely: true}); err == nil {
			klog.InfoS("Thawed a file system that an earlier engine had frozen", "volume", id, "device", device)
			unmarkFrozen(p, id)
		}
	}
	if err != nil {
		klog.ErrorS(err, "A file system may still be frozen", "volume", id, "device", device)
	}
}

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const (
	// orphanPatience is how long a starting engine waits for the workers of a dead one to finish: they
	// flush and exit when they lose their supervisor.
	orphanPatience = 10 * time.Second
	orphanPoll     = 20 * time.Millisecond
)

// recoverPool puts away what a dead engine left: file systems that it had frozen, devices that nobody
// serves any more. It returns the volumes whose device is still there: those that are held wait for a worker, the others
// have a reason.
func recoverPool(ctx context.Context, p *pool.Pool, held map[string]bool, patience time.Duration) map[string]*attachment {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	failed := map[string]*attachment{}
	devices, err := blockdev.Bound(devicePrefix)
	if err != nil {
		klog.ErrorS(err, "Cannot look for devices of an earlier engine")
	}
	for name, device := range devices {
		id := strings.TrimPrefix(name, devicePrefix)
		if !pool.ValidID(id) || !p.Owns(id) {
			continue // another engine's
		}
		if held[id] {
			failed[id] = &attachment{device: device, failure: "an earlier engine has ended", waiting: true}
			continue
		}
		err := waitForOrphan(ctx, p, id)
		if err == nil {
			err = clearDevice(p, id, device)
		}
		if err != nil {
			klog.ErrorS(err, "Device of an earlier engine stays", "volume", id, "device", device)
			failed[id] = &attachment{device: device, failure: err.Error()}
			continue
		}
		klog.InfoS("Removed a device of an earlier engine", "volume", id, "device", device)
	}
	removeMarkers(p)
	return failed
}

// waitForOrphan waits until no worker of a dead engine holds the volume.
func waitForOrphan(ctx context.Context, p *pool.Pool, id string) error {
	tick := time.NewTicker(orphanPoll)
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
			return fmt.Errorf("a worker of an earlier engine does not end: %w", err)
		case <-tick.C:
		}
	}
}

// clearDevices removes the devices of a volume that no worker serves any more. ErrInUse if one is still
// open; the kernel removes that one when its last user closes it.
func clearDevices(p *pool.Pool, id string) error {
	devices, err := blockdev.Find(devicePrefix + id)
	if err != nil {
		return fmt.Errorf("find the devices of %s: %w", id, err)
	}
	var failures []error
	for _, d := range devices {
		if d.Name == devicePrefix+id {
			failures = append(failures, clearDevice(p, id, d.Path))
		}
	}
	return errors.Join(failures...)
}

// clearDevice removes a dead device, having thawed its file system if a dead engine left it frozen.
func clearDevice(p *pool.Pool, id, device string) error {
	if err := thawMarked(p, id, device); err != nil {
		klog.ErrorS(err, "A file system may still be frozen", "volume", id, "device", device)
	}
	err := blockdev.Clear(device)
	if errors.Is(err, blockdev.ErrBusy) {
		return fmt.Errorf("%w: the engine that served it is dead: %w", ErrInUse, err)
	}
	return err
}

// thawMarked thaws the file system on device if a marker says that a dead engine had frozen it.
func thawMarked(p *pool.Pool, id, device string) error {
	path := markerPath(p, id)
	m, err := readMarker(path)
	if err != nil || m.Device != device {
		return err
	}
	if err := thawDevice(m.Device, m.FSType); err != nil {
		return err
	}
	klog.InfoS("Thawed a file system that an earlier engine had frozen", "volume", id, "device", device)
	return os.Remove(path)
}

// thawDevice thaws the file system that is mounted from device, wherever that is. The mount may be in
// a mount namespace that we cannot see, but a second mount of a device shares the superblock of the first:
// a detached one, which no namespace shows, gives us a directory for FITHAW.
func thawDevice(device, fsType string) error {
	mount, err := detachedMount(device, fsType, false)
	if errors.Is(err, unix.EBUSY) { // mounted read-only
		mount, err = detachedMount(device, fsType, true)
	}
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	root, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the root of %s: %w", device, err)
	}
	defer unix.Close(root)
	if err := unix.IoctlSetInt(root, fiThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not frozen
		return fmt.Errorf("FITHAW %s: %w", device, err)
	}
	return nil
}

// detachedMount mounts device without attaching it anywhere; the mount ends when the descriptor is closed.
func detachedMount(device, fsType string, readOnly bool) (int, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", fsType, err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", device); err != nil {
		return -1, fmt.Errorf("mount source %s: %w", device, err)
	}
	if readOnly {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return -1, fmt.Errorf("mount %s read-only: %w", device, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount %s: %w", device, err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w", device, err)
	}
	return mount, nil
}

// removeMarkers removes the markers of volumes whose device is gone: no file system without a device.
func removeMarkers(p *pool.Pool) {
	volumes, err := p.Volumes()
	if err != nil {
		klog.ErrorS(err, "Some volumes cannot be read")
	}
	for _, v := range volumes {
		devices, err := blockdev.Bound(devicePrefix + v.ID)
		if err != nil || len(devices) > 0 {
			continue
		}
		if err := os.Remove(markerPath(p, v.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
			klog.ErrorS(err, "Freeze marker stays", "volume", v.ID)
		}
	}
}

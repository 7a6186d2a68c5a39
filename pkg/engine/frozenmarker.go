package engine

import (
	"encoding/json"
	"errors"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// frozenNote is the note of the marker pool.Frozen: what a later engine needs to find the file system by.
type frozenNote struct {
	Device string `json:"device"`
}

// markFrozen says that the file system on a volume's device may be frozen from now on. Durable when it returns.
func markFrozen(p *pool.Pool, volume, device string) error {
	note, err := json.Marshal(frozenNote{Device: device})
	if err != nil {
		return err
	}
	return p.Mark(volume, pool.Frozen, note)
}

// unmarkFrozen says that it is not frozen any more.
func unmarkFrozen(p *pool.Pool, volume string) {
	if err := p.Unmark(volume, pool.Frozen); err != nil && !errors.Is(err, pool.ErrNotFound) {
		klog.ErrorS(err, "Freeze marker stays", "volume", volume)
	}
}

// frozenBefore returns the device of the volume whose file system an earlier engine may have left frozen, "" if none is.
func frozenBefore(p *pool.Pool, volume string) (device string, err error) {
	note, set, err := p.Marked(volume, pool.Frozen)
	if err != nil || !set {
		return "", err
	}
	var m frozenNote
	if err := json.Unmarshal(note, &m); err != nil {
		return "", nil //nolint:nilerr // it was never finished, so nothing was frozen
	}
	return m.Device, nil
}

// removeMarkers removes the markers of volumes that have no device: no file system without a device.
func removeMarkers(p *pool.Pool, devices map[string]string) {
	volumes, err := p.Volumes()
	if err != nil {
		klog.ErrorS(err, "Some volumes cannot be read")
	}
	for _, v := range volumes {
		if devices[v.ID] != "" {
			continue
		}
		if _, set, err := p.Marked(v.ID, pool.Frozen); err == nil && !set {
			continue
		}
		unmarkFrozen(p, v.ID)
	}
}

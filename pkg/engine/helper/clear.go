package helper

import (
	"errors"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
)

// clearNamed removes the dead devices of a name. rpc.ErrInUse if one is still open.
func clearNamed(name string) error {
	devices, err := blockdev.Find(name)
	if err != nil {
		return fmt.Errorf("find the devices: %w", err)
	}
	var failures []error
	for _, d := range devices {
		if d.Name != name {
			continue
		}
		err := blockdev.Clear(d.Path, d.Name)
		if errors.Is(err, blockdev.ErrBusy) {
			err = rpc.Refuse(rpc.ErrInUse, "the engine that served %[1]s is dead, and something on the node has it open: end what `fuser -vm %[1]s` shows there", d.Path)
		}
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}

package engine

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A pod has the node of the device that its volume was attached as, whatever becomes of the device. So the number must not go
// to another volume before this one is detached, also when the device is long gone: because the processes that kept it bound
// have died, or somebody has unbound it. A file beside the image remembers it for the next engine, until the machine starts anew.

// devicesFile is in the volume's directory.
const devicesFile = "devices"

// bootIDFile has another content after each start of the machine.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// assignedDevices are the devices that volumes were attached as and not yet detached from, by volume; the last one is the present one.
type assignedDevices struct {
	mu       sync.Mutex // guards what follows
	byVolume map[string][]string
}

// devicesNote is the content of a volume's file, in JSON.
type devicesNote struct {
	Boot    string   `json:"boot"`
	Devices []string `json:"devices"`
}

// read reads what earlier engines have noted.
func (a *assignedDevices) read(p *pool.Pool) {
	all := map[string][]string{}
	volumes, err := p.Volumes()
	if err != nil {
		klog.ErrorS(err, "Some volumes cannot be read")
	}
	boot := bootID()
	for _, v := range volumes {
		b, err := os.ReadFile(devicesPath(p, v.ID))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var n devicesNote
		if err == nil {
			err = json.Unmarshal(b, &n)
		}
		if err != nil {
			klog.ErrorS(err, "Cannot tell what devices the volume had", "volume", v.ID)
		}
		if n.Boot == boot && len(n.Devices) > 0 {
			all[v.ID] = n.Devices
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.byVolume = all
}

func devicesPath(p *pool.Pool, id string) string {
	return filepath.Join(filepath.Dir(p.ImagePath(id)), devicesFile)
}

func bootID() string {
	b, err := os.ReadFile(bootIDFile)
	if err != nil {
		klog.ErrorS(err, "Cannot tell one start of the machine from another")
	}
	return strings.TrimSpace(string(b))
}

// add notes a device of a volume. The note need not survive the machine, so nothing is synced.
func (a *assignedDevices) add(p *pool.Pool, id, device string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.byVolume[id]
	if len(before) > 0 && before[len(before)-1] == device {
		return
	}
	now := append(slices.DeleteFunc(slices.Clone(before), func(d string) bool { return d == device }), device)
	if a.byVolume == nil {
		a.byVolume = map[string][]string{}
	}
	a.byVolume[id] = now
	b, err := json.Marshal(devicesNote{bootID(), now})
	path := devicesPath(p, id)
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil { // it matters only if this engine dies, the holder too, and somebody unbinds the device
		klog.ErrorS(err, "The volume's device is not noted for a next engine", "volume", id, "device", device)
	}
}

// forget is for a volume that was detached.
func (a *assignedDevices) forget(p *pool.Pool, id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.byVolume[id]; !ok {
		return
	}
	delete(a.byVolume, id)
	if err := os.Remove(devicesPath(p, id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "The note of the volume's devices stays", "volume", id)
	}
}

// count returns how many devices a volume has had.
func (a *assignedDevices) count(id string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.byVolume[id])
}

// present returns the device that a volume was last attached as; unknown if that is not known.
func (a *assignedDevices) present(id, unknown string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if all := a.byVolume[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return unknown
}

// without returns the present device of each volume that is not among some.
func (a *assignedDevices) without(some map[string]string) map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	rest := map[string]string{}
	for id, all := range a.byVolume {
		if _, ok := some[id]; !ok {
			rest[id] = all[len(all)-1]
		}
	}
	return rest
}

// avoid returns the devices of all volumes but one, and those of some that this one has not had.
func (a *assignedDevices) avoid(id string, some []string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := slices.DeleteFunc(slices.Clone(some), func(d string) bool { return slices.Contains(a.byVolume[id], d) })
	for other, devices := range a.byVolume {
		if other != id {
			all = append(all, devices...)
		}
	}
	return all
}

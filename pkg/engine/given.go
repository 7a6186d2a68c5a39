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

// givenFile is in the volume's directory.
const givenFile = "devices"

// bootIDFile has another content after each start of the machine.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// given are the devices that volumes were attached as and not yet detached from, by volume; the last one is the present one.
type given struct {
	mu      sync.Mutex // guards what follows
	devices map[string][]string
}

// givenNote is the content of a volume's file, in JSON.
type givenNote struct {
	Boot    string   `json:"boot"`
	Devices []string `json:"devices"`
}

// read reads what earlier engines have noted.
func (g *given) read(p *pool.Pool) {
	all := map[string][]string{}
	volumes, err := p.Volumes()
	if err != nil {
		klog.ErrorS(err, "Some volumes cannot be read")
	}
	boot := bootID()
	for _, v := range volumes {
		b, err := os.ReadFile(givenPath(p, v.ID))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var n givenNote
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
	g.mu.Lock()
	defer g.mu.Unlock()
	g.devices = all
}

func givenPath(p *pool.Pool, id string) string {
	return filepath.Join(filepath.Dir(p.ImagePath(id)), givenFile)
}

func bootID() string {
	b, err := os.ReadFile(bootIDFile)
	if err != nil {
		klog.ErrorS(err, "Cannot tell one start of the machine from another")
	}
	return strings.TrimSpace(string(b))
}

// add notes a device of a volume. The note need not survive the machine, so nothing is synced.
func (g *given) add(p *pool.Pool, id, device string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := g.devices[id]
	if len(before) > 0 && before[len(before)-1] == device {
		return
	}
	now := append(slices.DeleteFunc(slices.Clone(before), func(d string) bool { return d == device }), device)
	if g.devices == nil {
		g.devices = map[string][]string{}
	}
	g.devices[id] = now
	b, err := json.Marshal(givenNote{bootID(), now})
	path := givenPath(p, id)
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
func (g *given) forget(p *pool.Pool, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.devices[id]; !ok {
		return
	}
	delete(g.devices, id)
	if err := os.Remove(givenPath(p, id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "The note of the volume's devices stays", "volume", id)
	}
}

// count returns how many devices a volume has had.
func (g *given) count(id string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.devices[id])
}

// present returns the device that a volume was last attached as; unknown if that is not known.
func (g *given) present(id, unknown string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if all := g.devices[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return unknown
}

// without returns the present device of each volume that is not among some.
func (g *given) without(some map[string]string) map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	rest := map[string]string{}
	for id, all := range g.devices {
		if _, ok := some[id]; !ok {
			rest[id] = all[len(all)-1]
		}
	}
	return rest
}

// avoid returns the devices of all volumes but one, and those of some that this one has not had.
func (g *given) avoid(id string, some []string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := slices.DeleteFunc(slices.Clone(some), func(d string) bool { return slices.Contains(g.devices[id], d) })
	for other, devices := range g.devices {
		if other != id {
			all = append(all, devices...)
		}
	}
	return all
}

package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

const (
	imageFile  = "image.qcow2"
	volumeFile = "volume.json"

	volumeLimit = 64 << 10 // bytes of volume.json
)

// Volume is what volume.json holds.
type Volume struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"` // CSI name, as the provisioner gave it
	Size       int64             `json:"size"` // virtual bytes at creation
	Parameters map[string]string `json:"parameters,omitempty"`
	Created    time.Time         `json:"created"`
	Source     string            `json:"source,omitempty"` // "snapshot:<snapshot ID>" or "volume:<volume ID>" or ""
	// Grown is the largest size that the volume has had, in virtual bytes, if that is more than Size.
	Grown int64 `json:"grown,omitempty"`
	// Asked holds, for a size in virtual bytes that the volume has had, the least that was asked for when it got that: sizes
	// are rounded up, and some file systems need more. What was asked for a size is enough for a copy of it.
	Asked map[int64]int64 `json:"asked,omitempty"`
	// Claim is what the volume was made for, as far as the provisioner has said.
	Claim Claim `json:"claim,omitzero"`
	// Mode is ModeBlock or ModeFilesystem, what the volume was made as; "" if it is free, or older than this field.
	Mode string `json:"mode,omitempty"`
	// Tombstone: the volume was deleted while it had snapshots. It is not listed and not attachable.
	Tombstone bool `json:"tombstone,omitempty"`
}

// Claim names a PersistentVolumeClaim, and the PersistentVolume that was made for it.
type Claim struct {
	Namespace        string `json:"namespace"`
	Name             string `json:"name"`
	PersistentVolume string `json:"persistentVolume"`
}

// Values of Volume.Mode.
const (
	ModeBlock      = "Block"
	ModeFilesystem = "Filesystem"
)

// LeastSize is the size, in virtual bytes, below which the volume never falls. Its image may: a revert gives it the size
// that it had at its snapshot.
func (v Volume) LeastSize() int64 { return max(v.Size, v.Grown) }

// AskedFor returns what was asked for when the volume got a size.
func (v Volume) AskedFor(size int64) int64 {
	if asked, ok := v.Asked[size]; ok {
		return asked
	}
	return size
}

// Ask records what was asked for when the volume got a size.
func (v *Volume) Ask(asked, size int64) {
	if asked <= 0 || asked >= v.AskedFor(size) {
		return
	}
	if v.Asked == nil {
		v.Asked = map[int64]int64{}
	}
	v.Asked[size] = asked
}

// Volumes returns all volumes, tombstones too, sorted by ID. A volume whose volume.json cannot be read is
// left out and reported in the joined error, which does not stop the others.
func (p *Pool) Volumes() ([]Volume, error) {
	var (
		volumes  []Volume
		failures []error
	)
	err := p.eachVolume(func(ID) bool { return true }, func(_ ID, v Volume, err error) {
		if err != nil {
			failures = append(failures, err)
			return
		}
		volumes = append(volumes, v)
	})
	return volumes, errors.Join(append(failures, err)...)
}

// Volume returns one, tombstones too. ErrNotFound, ErrBadID.
func (p *Pool) Volume(id string) (Volume, error) {
	parsed, err := ParseID(id)
	if err != nil {
		return Volume{}, err
	}
	d, err := p.openParsed(parsed)
	if err != nil {
		return Volume{}, err
	}
	defer d.Close()
	v, err := readVolume(d, parsed)
	if err != nil && !p.holds(parsed) { // removed while it was read
		return Volume{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	return v, err
}

// FindByName returns the volume of a CSI name, tombstones left out. ErrNotFound.
//
// A volume whose volume.json cannot be read, and whose ID says that the name may be its own, is an error of another kind.
func (p *Pool) FindByName(name string) (Volume, error) {
	var (
		found    *Volume
		failures []error
	)
	mayBe := func(id ID) bool { // by the ID alone: only few of the pool's volumes need to be read
		idName, _, _ := splitID(id.text)
		return idName == safeName(name)
	}
	err := p.eachVolume(mayBe, func(_ ID, v Volume, err error) {
		switch {
		case err != nil:
			failures = append(failures, err)
		case v.Name == name && !v.Tombstone:
			found = &v
		}
	})
	switch {
	case err != nil:
		return Volume{}, err
	case found != nil:
		return *found, nil
	case len(failures) > 0:
		return Volume{}, errors.Join(failures...)
	}
	return Volume{}, fmt.Errorf("%w: name %q", ErrNotFound, name)
}

// ImagePath is where a volume's image lies, an absolute path. Empty for a malformed ID.
func (p *Pool) ImagePath(id string) string {
	parsed, err := ParseID(id)
	if err != nil {
		return ""
	}
	return p.imagePath(parsed)
}

func (p *Pool) imagePath(id ID) string { return filepath.Join(p.path, id.in(volumesDir), imageFile) }

// eachVolume calls fn, in the order of IDs, for each volume whose ID is wanted. What is no volume's directory by
// its name is passed over.
func (p *Pool) eachVolume(want func(ID) bool, fn func(id ID, v Volume, err error)) error {
	root, err := p.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	return eachVolumeIn(root, volumesDir, want, fn)
}

// eachVolumeIn does it for the volumes in a part of the pool.
func eachVolumeIn(root dir, part string, want func(ID) bool, fn func(id ID, v Volume, err error)) error {
	all, err := root.sub(part)
	if err != nil {
		return err
	}
	defer all.Close()
	names, err := all.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		id, err := ParseID(name)
		if err != nil || !want(id) {
			continue
		}
		v, err := readVolumeIn(all, id)
		if err != nil {
			if _, gone := all.Lstat(id.dir()); errors.Is(gone, fs.ErrNotExist) {
				continue // removed since its name was read
			}
		}
		fn(id, v, err)
	}
	return nil
}

func readVolumeIn(all dir, id ID) (Volume, error) {
	d, err := all.sub(id.dir())
	if err != nil {
		return Volume{}, err
	}
	defer d.Close()
	return readVolume(d, id)
}

// readVolume reads a volume.json. Errors name the file.
func readVolume(d dir, id ID) (Volume, error) {
	var v Volume
	data, err := d.readFile(volumeFile, volumeLimit)
	if err != nil {
		return v, fmt.Errorf("volume %s: %w", id, err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return Volume{}, fmt.Errorf("%s/%s: %w", d.Name(), volumeFile, err)
	}
	if v.ID != id.text || v.Name == "" || v.Size < 0 {
		return Volume{}, fmt.Errorf("%s/%s: ID %.80q, name %.80q, %d bytes: not what was written for this volume",
			d.Name(), volumeFile, v.ID, v.Name, v.Size)
	}
	return v, nil
}

func writeVolume(d dir, v Volume) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if len(data) >= volumeLimit {
		return fmt.Errorf("%s/%s would have %d bytes, more than %d", d.Name(), volumeFile, len(data), volumeLimit)
	}
	return d.replaceFile(volumeFile, append(data, '\n'))
}

// openVolume opens a volume's directory. ErrNotFound, ErrBadID.
func (p *Pool) openVolume(id string) (dir, error) {
	parsed, err := ParseID(id)
	if err != nil {
		return dir{}, err
	}
	return p.openParsed(parsed)
}

// openParsed is openVolume for an ID that was parsed.
func (p *Pool) openParsed(id ID) (dir, error) {
	root, err := p.enter()
	if err != nil {
		return dir{}, err
	}
	defer root.Close()
	d, err := root.sub(id.in(volumesDir))
	if errors.Is(err, fs.ErrNotExist) {
		return dir{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	return d, err
}

// holds tells whether there is anything under the ID, or no telling.
func (p *Pool) holds(id ID) bool {
	d, err := p.openParsed(id)
	if err != nil {
		return !errors.Is(err, ErrNotFound)
	}
	return d.Close() == nil
}

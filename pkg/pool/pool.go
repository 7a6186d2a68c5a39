// Package pool keeps a node's volumes: a directory with one subdirectory per volume, which holds the
// image and what Kubernetes knows about it. All state is in the files; nothing is cached.
package pool

import (
	"context"
	"errors"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

var (
	// ErrNotReady is returned by every operation when the directory holds no pool.json, or another pool's: its disk
	// is probably not mounted.
	ErrNotReady = errors.New("pool is not ready")
	// ErrNotFound is returned for a volume that this pool does not hold.
	ErrNotFound = errors.New("volume not found")
	// ErrInUse is returned when another process, or another goroutine, holds the volume.
	ErrInUse = errors.New("volume is in use")
	// ErrBadID is returned for an ID that this driver cannot have made.
	ErrBadID = errors.New("malformed volume ID")
)

// Volume is what volume.json holds.
type Volume struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"` // CSI name, as the provisioner gave it
	Size       int64             `json:"size"` // virtual bytes at creation; the image's own size is the truth
	Parameters map[string]string `json:"parameters,omitempty"`
	Created    time.Time         `json:"created"`
	Source     string            `json:"source,omitempty"` // "snapshot:<snapshot ID>" or "volume:<volume ID>" or ""
	// Tombstone: the volume was deleted while it had snapshots. It is not listed and not attachable.
	Tombstone bool `json:"tombstone,omitempty"`
}

// Init makes dir a pool. A pool is left as it is.
func Init(dir string) error { panic("stub") }

// Pool is an opened pool directory.
type Pool struct{}

// Open reads pool.json. ErrNotReady if there is none.
func Open(dir string) (*Pool, error) { panic("stub") }

// Ready tells whether the directory still is the pool that was opened: nil or ErrNotReady.
func (p *Pool) Ready() error { panic("stub") }
func (p *Pool) Dir() string  { panic("stub") }
func (p *Pool) UUID() string { panic("stub") }

// NewID makes an ID: <name, safe, at most 40>-<8 of the pool's UUID>-<8 random>.
func (p *Pool) NewID(name string) string { panic("stub") }

// ValidID tells whether an ID is well-formed (it is then safe as a path element).
func ValidID(id string) bool { panic("stub") }

// Owns tells whether a well-formed ID was made by this pool.
func (p *Pool) Owns(id string) bool { panic("stub") }

// Volumes returns all volumes, tombstones too, sorted by ID. A volume whose volume.json cannot be read is
// left out and reported in the joined error, which does not stop the others.
func (p *Pool) Volumes() ([]Volume, error) { panic("stub") }

// Volume returns one, tombstones too. ErrNotFound, ErrBadID.
func (p *Pool) Volume(id string) (Volume, error) { panic("stub") }

// FindByName returns the volume of a CSI name, tombstones left out. ErrNotFound.
func (p *Pool) FindByName(name string) (Volume, error) { panic("stub") }

// ImagePath is where a volume's image lies.
func (p *Pool) ImagePath(id string) string { panic("stub") }

// Create makes a volume that becomes visible, whole, when fill has returned nil: fill writes the image at
// path, which does not exist yet. What an interrupted Create left is removed by Clean.
func (p *Pool) Create(ctx context.Context, v Volume, fill func(ctx context.Context, path string) error) error {
	panic("stub")
}

// Clean removes what interrupted Creates and removals left. Call it once, before the first Create.
func (p *Pool) Clean() error { panic("stub") }

// Lock takes a volume for this caller alone, across processes (the engine's worker holds it while the
// volume is attached). ErrInUse at once if somebody has it.
func (p *Pool) Lock(id string) (*Lease, error) { panic("stub") }

// Lease is the right to open and change one volume.
type Lease struct{}

func (l *Lease) Volume() Volume                           { panic("stub") }
func (l *Lease) Open(readOnly bool) (*qcow2.Image, error) { panic("stub") } // caller closes it before Unlock
func (l *Lease) Update(change func(*Volume)) error        { panic("stub") } // rewrites volume.json durably
func (l *Lease) Remove() error                            { panic("stub") } // the whole volume; Unlock after
func (l *Lease) Unlock() error                            { panic("stub") }

// Space is what the pool's file system offers.
type Space struct {
	Total, Free int64 // bytes, of the file system, for this user
	Used        int64 // bytes that the pool's volumes occupy
	Promised    int64 // bytes that volumes may still come to occupy: sizes less what is allocated
}

func (p *Pool) Space() (Space, error) { panic("stub") }

package pool

import (
	"errors"
	"io/fs"
)

// A Marker is a file beside a volume's image that says one thing about the volume by being there. It outlives
// processes, and power.
type Marker string

const (
	// Clean says that the image was closed properly when it was last detached. This, not its opposite, is
	// marked, so that what goes wrong, a full file system too, errs to the safe side: leaks are looked for in vain.
	Clean Marker = "clean"
	// Frozen says that the file system on the volume may be frozen.
	Frozen Marker = "frozen"
	// Unformatted says that nothing has been written to the volume but by its first format, of which the note says that it
	// has begun: another one destroys nothing.
	Unformatted Marker = "unformatted"
)

const noteLimit = 4 << 10 // bytes

// Mark sets a marker, with a note of at most 4 KiB for whoever finds it. Durable when it returns. The caller
// needs no Lease, but nobody else may set or remove the same marker of the volume meanwhile. qcow2.ErrNoSpace.
func (p *Pool) Mark(id string, m Marker, note []byte) error {
	d, err := p.openVolume(id)
	if err != nil {
		return err
	}
	defer d.Close()
	return noSpace(d.replaceFile(string(m), note))
}

// Unmark removes a marker, durably. One that is not there is fine.
func (p *Pool) Unmark(id string, m Marker) error {
	d, err := p.openVolume(id)
	if err != nil {
		return err
	}
	defer d.Close()
	return unmark(d, m)
}

// Marked tells whether a marker is set, and returns its note.
func (p *Pool) Marked(id string, m Marker) (note []byte, set bool, err error) {
	d, err := p.openVolume(id)
	if err != nil {
		return nil, false, err
	}
	defer d.Close()
	return marked(d, m)
}

// MarkAttached says that the image is being written from now on. Durable when it returns.
func (l *Lease) MarkAttached() error { return unmark(l.dir, Clean) }

// ClearAttached says that the image was closed properly. Call it after that.
func (l *Lease) ClearAttached() error { return noSpace(l.dir.replaceFile(string(Clean), nil)) }

// WasUnclean tells whether the volume was attached and not properly detached: its image may have leaks.
func (l *Lease) WasUnclean() (bool, error) {
	_, set, err := marked(l.dir, Clean)
	return !set, err
}

// unmark keeps the file as the spare of the next replacement, which then needs no space.
func unmark(d dir, m Marker) error {
	if err := d.Rename(string(m), string(m)+spareSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.sync()
}

func marked(d dir, m Marker) (note []byte, set bool, err error) {
	note, err = d.readFile(string(m), noteLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return note, err == nil, err
}

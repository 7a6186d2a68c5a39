package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-qcow2/csi-qcow2/pkg/human"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// volumeRequest is a checked CreateVolumeRequest. Two that are equal ask for the same volume.
type volumeRequest struct {
	name       string
	size       sizeRange
	parameters volumeParameters
	source     contentSource
	minSize    int64  // bytes that the file system needs
	mode       string // pool.Volume.Mode
	claim      pool.Claim
}

func newVolumeRequest(req *csi.CreateVolumeRequest) (r volumeRequest, err error) {
	if err := checkVolumeName(req.GetName()); err != nil {
		return r, err
	}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return r, err
	}
	if len(req.GetMutableParameters()) > 0 {
		return r, invalid("there are no mutable parameters")
	}
	r = volumeRequest{name: req.GetName(), minSize: minVolumeSize, claim: claimOf(req.GetParameters())}
	if r.parameters, err = parseVolumeParameters(req.GetParameters()); err != nil {
		return r, err
	}
	if r.size, err = newSizeRange(req.GetCapacityRange()); err != nil {
		return r, err
	}
	if r.source, err = newContentSource(req.GetVolumeContentSource()); err != nil {
		return r, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		if c.GetMount() != nil {
			r.minSize = max(r.minSize, minFSSize(stagedFS(c, r.parameters)))
		}
	}
	r.mode = requestedMode(req.GetVolumeCapabilities())
	return r, nil
}

// createVolume returns the volume of the request's name, which it makes if there is none.
func (c *controller) createVolume(ctx context.Context, p *pool.Pool, r volumeRequest) (pool.Volume, error) {
	existing, err := p.FindByName(r.name)
	if err == nil {
		return existing, r.match(existing)
	}
	if !errors.Is(err, pool.ErrNotFound) {
		return pool.Volume{}, err
	}
	origin, err := c.resolve(ctx, p, r.source)
	if err != nil {
		return pool.Volume{}, err
	}
	if r.parameters, err = r.parameters.inherit(origin.volume); err != nil {
		return pool.Volume{}, err
	}
	size, err := r.chooseSize(origin)
	if err != nil {
		return pool.Volume{}, err
	}
	v := pool.Volume{
		ID: p.NewID(r.name), Name: r.name, Size: size, Parameters: r.parameters.record(),
		Created: time.Now().UTC(), Source: r.source.String(), Mode: r.mode, Claim: r.claim,
	}
	v.Ask(r.asked(origin), size)
	done, err := c.capacity.promise(p, v.ID, 0, size)
	if err != nil {
		return pool.Volume{}, err
	}
	defer done()
	if r.source.kind != noSource {
		return v, c.createCopy(ctx, p, v, origin)
	}
	var marks []pool.Marker
	if r.parameters.preallocation != qcow2.PreallocationOff { // its image does not look blank
		marks = append(marks, pool.Unformatted)
	}
	return v, p.Create(ctx, v, func(ctx context.Context, path string) error {
		return createImage(ctx, path, size, r.parameters)
	}, marks...)
}

// createCopy makes a volume with the content of an origin. Of one to which nobody has written, also when it had been
// copied, the copy is known to be empty.
func (c *controller) createCopy(ctx context.Context, p *pool.Pool, v pool.Volume, origin origin) error {
	var marks []pool.Marker
	empty := c.neverWritten(ctx, p, origin.volume)
	if empty {
		marks = append(marks, pool.Unformatted)
	}
	return p.Create(ctx, v, func(ctx context.Context, path string) error {
		if err := c.copyImage(ctx, p, origin, path, v.Size); err != nil {
			return err
		}
		if empty && !c.neverWritten(ctx, p, origin.volume) {
			return fmt.Errorf("%s was written to for the first time meanwhile: %w", origin.volume.ID, errBusy)
		}
		return nil
	}, marks...)
}

// asked is the size that the request is for. Nothing asked means the origin's.
func (r volumeRequest) asked(origin origin) int64 {
	if r.size.required == 0 {
		return origin.volume.AskedFor(origin.size)
	}
	return r.size.required
}

// chooseSize: a copy is at least as large as its origin, and if nothing is asked, exactly. Whoever asks for what the origin was
// asked for gets the origin's size.
func (r volumeRequest) chooseSize(origin origin) (int64, error) {
	most := maxSize(r.parameters.clusterSize)
	if r.source.kind == noSource {
		return r.size.choose(max(defaultVolumeSize, r.minSize), r.minSize, most)
	}
	if least := origin.volume.AskedFor(origin.size); roundUp(r.asked(origin)) < roundUp(least) {
		return 0, refuse(errOutOfRange, "%s are asked for, less than the %s of its source %s", human.ExactSize(r.size.required), human.ExactSize(least), r.source.id)
	}
	return r.size.choose(origin.size, max(origin.size, r.minSize), most)
}

// match is errExists if a volume is not what the request asks for.
func (r volumeRequest) match(v pool.Volume) error {
	switch {
	case !r.size.contains(v.Size):
		return fmt.Errorf("volume %q %w: it has %s", r.name, errExists, human.ExactSize(v.Size))
	case v.Source != r.source.String():
		return fmt.Errorf("volume %q %w: its content is from %q", r.name, errExists, v.Source)
	case r.mode != "" && v.Mode != "" && r.mode != v.Mode:
		return fmt.Errorf("volume %q %w: its mode is %s", r.name, errExists, v.Mode)
	case !r.parameters.match(v):
		return fmt.Errorf("volume %q %w: its parameters are %v", r.name, errExists, v.Parameters)
	}
	return nil
}

// createImage writes an empty image at path, which must not exist.
func createImage(ctx context.Context, path string, size int64, p volumeParameters) error {
	file, err := qcow2.CreateFile(path)
	if err != nil {
		return err
	}
	return errors.Join(qcow2.Create(ctx, file, size, qcow2.CreateOptions{ClusterSize: p.clusterSize, Preallocation: p.preallocation}), file.Close())
}

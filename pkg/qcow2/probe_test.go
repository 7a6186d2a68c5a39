package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"testing"
)

func TestProbe(t *testing.T) {
	for name, o := range map[string]CreateOptions{
		"default": {}, "version 2": {Version: 2}, "small clusters": {ClusterSize: 512}, "large clusters": {ClusterSize: 2 << 20},
		"narrow refcounts": {RefcountBits: 1}, "wide refcounts": {RefcountBits: 64}, "extended": {ExtendedL2: true},
		"preallocated": {Preallocation: PreallocationMetadata},
	} {
		t.Run(name, func(t *testing.T) {
			const size = 8 << 20
			f := newMemFile("probed")
			must(t, Create(t.Context(), f, size, o))
			h, err := Probe(f)
			must(t, err)
			if h.Size() != size || h.HasSnapshots() {
				t.Errorf("a new image: %d bytes, snapshots %v", h.Size(), h.HasSnapshots())
			}
			img, err := Open(f, OpenOptions{})
			must(t, err)
			taken := 0
			for ; taken < 3 && (o.RefcountBits != 1); taken++ {
				_, err = img.WriteAt(stamp(1, 0, size), 0)
				must(t, err)
				_, err = img.CreateSnapshot(t.Context(), fmt.Sprintf("%0255d", taken), nil)
				must(t, err)
			}
			disk := int64(size)
			if o.Version != 2 { // which cannot grow with snapshots
				disk *= 2
				must(t, img.Resize(t.Context(), disk))
			}
			h, err = Probe(f)
			must(t, err)
			if h.Size() != disk || h.HasSnapshots() != (taken > 0) {
				t.Errorf("%d snapshots: %d bytes, snapshots %v", taken, h.Size(), h.HasSnapshots())
			}
			checkDeletionRoom(t, img, h)
			must(t, img.Close())
		})
	}
}

// checkDeletionRoom proves that what a header says of a deletion's room is enough for the image, and little more.
func checkDeletionRoom(t *testing.T, img *Image, h Header) {
	t.Helper()
	length := img.Info().FileSize
	img.alloc.mu.Lock()
	need := img.deletionRoom() * img.g.ClusterSize
	img.alloc.mu.Unlock()
	if got := h.DeletionRoom(length); got < need || got > 2*need {
		t.Errorf("a deletion needs %d bytes, the header says %d", need, got)
	}
	if longer := h.DeletionRoom(1 << 45); longer <= need {
		t.Errorf("for a file of 32 TiB the header says %d bytes", longer)
	}
}

func TestProbeOfHostileImages(t *testing.T) {
	f := newMemFile("sound")
	must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
	sound := make([]byte, 512)
	_, err := f.ReadAt(sound, 0)
	must(t, err)
	with := func(change func(b []byte)) []byte {
		b := bytes.Clone(sound)
		change(b)
		return b
	}
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"empty":         {nil, ErrUnsupported},
		"magic only":    {sound[:4], ErrUnsupported},
		"foreign":       {bytes.Repeat([]byte("no image"), 64), ErrUnsupported},
		"version":       {with(func(b []byte) { b[7] = 9 }), ErrUnsupported},
		"cluster bits":  {with(func(b []byte) { b[23] = 63 }), ErrUnsupported},
		"refcounts":     {with(func(b []byte) { b[99] = 7 }), ErrCorrupt},
		"negative size": {with(func(b []byte) { b[24] = 0xff }), ErrLimit},
		"huge size":     {with(func(b []byte) { binary.BigEndian.PutUint64(b[24:], math.MaxInt64) }), ErrLimit},
		"backing file":  {with(func(b []byte) { b[15], b[19] = 104, 4 }), nil},
		"feature":       {with(func(b []byte) { b[72] = 0x80 }), nil},
	} {
		h, err := Probe(bytes.NewReader(c.image))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if want := int64(1 << 20); c.want == nil && h.Size() != want || c.want != nil && (h.Size() != 0 || h.DeletionRoom(1<<30) != 0) {
			t.Errorf("%s: %d bytes, room %d", name, h.Size(), h.DeletionRoom(1<<30))
		}
	}
}

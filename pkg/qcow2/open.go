package qcow2

import (
	"errors"
	"fmt"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/fsck"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// OpenOptions say how an image is opened.
type OpenOptions struct {
	ReadOnly    bool
	L2CacheSize int64 // bytes of L2 tables kept in memory, at least four tables; 0 = 32 MiB
	// MakeRoom, if not nil, gives blocks back to a file system that is full, for an operation that will free more. It may
	// be called by DeleteSnapshot and DropActive, and is not safe for concurrent use.
	MakeRoom func() error
	// Redo, if not nil, keeps what is not yet committed for a next process; what a dead one has left in it is committed
	// first.
	Redo *RedoLog
	// Trace, if not nil, is told how long each phase of the operations on snapshots and the size took, by the goroutine that carries
	// the operation out. It must not call the image.
	Trace func(Phase, time.Duration)
}

const defaultL2CacheSize = 32 << 20

// Open takes ownership of f: Close closes it, and so does Open when it fails. The image is not probed for
// other formats; features that are not supported are refused by name with ErrUnsupported. One that is marked corrupt
// can be opened for reading only, else ErrCorrupt. To open one for writing that is marked dirty, for its writer postponed its
// reference counts, takes a walk through all of its metadata, which counts them. So does one that others have written since we
// did, or the first time: ErrCorrupt if its counts are too low. Until something is changed the file stays as it is.
func Open(f File, o OpenOptions) (*Image, error) {
	img, err := open(f, o)
	if err != nil {
		if errors.Is(err, ErrCorrupt) && !errors.Is(err, fsck.ErrNeedsRepair) {
			err = fmt.Errorf("%w; %w", err, fsck.ErrNeedsRepair)
		}
		return nil, errors.Join(fmt.Errorf("open %s: %w", f.Name(), err), f.Close())
	}
	return img, nil
}

func open(file File, o OpenOptions) (*Image, error) {
	f := host.NewSyncer(file)
	h, err := openHeader(f, o)
	if err != nil {
		return nil, err
	}
	g := h.Geometry()
	direct, _ := file.(host.DirectIO)
	if direct != nil && direct.BlockSize() > g.ClusterSize {
		return nil, fmt.Errorf("%w: clusters of %d bytes on a file system that writes %d bytes at once", ErrUnsupported, g.ClusterSize, direct.BlockSize())
	}
	img := &Image{
		f: f, direct: direct, g: g, readOnly: o.ReadOnly, version: h.Version, makeRoom: o.MakeRoom, phases: phases{trace: o.Trace},
		guests: newRangeLock(), views: make(map[string]int),
		loading: make(map[int64]chan struct{}),
	}
	img.packed.Kind = h.CompressionType
	img.hdr.Store(&h)
	if img.l1, err = format.ReadL1(f, g, h.L1Offset, h.L1Size, o.ReadOnly); err != nil {
		return nil, fmt.Errorf("active L1 table: %w", err)
	}
	if img.rows, img.rowBytes, err = format.ReadSnapshotTable(f, &h); err != nil {
		return nil, err
	}
	cache := o.L2CacheSize
	if cache <= 0 {
		cache = defaultL2CacheSize
	}
	img.l2 = newL2Cache(cache, g)
	if o.ReadOnly {
		return img, nil
	}
	if img.alloc, err = newAllocator(f, g, &h); err != nil {
		return nil, err
	}
	img.alloc.background = &img.background
	img.alloc.sync, img.alloc.fail, img.alloc.switchHeader = img.sync, img.fail, img.switchHeader
	img.alloc.metadata = newMetadataMap(cache)
	if err := img.noteMetadata(); err != nil {
		return nil, err
	}
	if h.Autoclear != 0 {
		f.BeforeFirst(img.clearFeatures)
		h.Autoclear = 0
		img.hdr.Store(&h)
	}
	if o.Redo != nil {
		err = img.replay(o.Redo)
	}
	return img, err
}

// openHeader returns the header of an image that can be used as o says. One that is to be written is sound then: its counts are
// vouched for, or have been verified.
func openHeader(f *host.Syncer, o OpenOptions) (format.Header, error) {
	if o.ReadOnly {
		return format.ReadHeader(f, format.DecodeHeader)
	}
	// Who had the image before may have been killed. What it did last must not be lost in a power cut while what is
	// written on top of it stays.
	if err := f.Sync(); err != nil {
		return format.Header{}, err
	}
	h, err := format.ReadHeader(f, format.DecodeHeader)
	if err != nil {
		return format.Header{}, err
	}
	switch {
	case h.Incompatible&format.IncompatCorrupt != 0:
		return format.Header{}, fmt.Errorf("%w: the image is marked so; %w", ErrCorrupt, fsck.ErrNeedsRepair)
	case h.Incompatible&format.IncompatDirty != 0:
		if err := fsck.Recount(f, h); err != nil {
			return format.Header{}, err
		}
		return format.ReadHeader(f, format.DecodeHeader)
	case !host.Vouched(f.File) && !o.Redo.used():
		return h, fsck.Verify(f.File, h)
	}
	return h, nil
}

// clearFeatures says before the first write that we maintain none of the features that an autoclear bit stands for. The header
// in memory has none of the bits from the start.
func (img *Image) clearFeatures() error {
	if _, err := img.f.File.WriteAt(img.hdr.Load().Encode(), 0); err != nil {
		return fmt.Errorf("clear the autoclear features: %w", err)
	}
	return img.f.File.Sync()
}

// noteMetadata fills the map of an image that is being opened. Structures of which each has its clusters to itself must
// not overlap; an L2 table where something else is makes its use fail, not the opening.
func (img *Image) noteMetadata() error {
	h, g, m := img.hdr.Load(), img.g, img.alloc.metadata
	note := func(what string, off format.HostOffset, length int64) error {
		if err := m.add(g.RunOf(off, length), metadataSole); err != nil {
			return fmt.Errorf("%s at file offset %#x: %w", what, off, err)
		}
		return nil
	}
	if err := note("header", 0, g.ClusterSize); err != nil {
		return err
	}
	if err := note("refcount table", h.RefTableOffset, g.Bytes(h.RefTableClusters)); err != nil {
		return err
	}
	for _, off := range img.alloc.rc.table {
		if off == 0 {
			continue
		}
		if err := note("refcount block", off, g.ClusterSize); err != nil {
			return err
		}
	}
	if err := note("active L1 table", h.L1Offset, h.L1Size*8); err != nil {
		return err
	}
	if err := note("snapshot table", h.SnapshotsOffset, img.rowBytes); err != nil {
		return err
	}
	scan := int64(maxScan)
	for i := range img.rows {
		row := &img.rows[i]
		if scan -= row.L1Size * 8; scan < 0 {
			break
		}
		if err := note("L1 table of snapshot "+row.Name, row.L1Offset, row.L1Size*8); err != nil {
			return err
		}
	}
	return img.noteTables()
}

// noteTables notes L2 tables: one that is COPIED must be nobody else's.
func (img *Image) noteTables() error {
	note := func(l1 []format.L1Entry) error {
		for i, e := range l1 {
			c, kind := img.g.Cluster(e.Offset()), metadataL2
			if e.Copied() {
				kind = metadataOwnL2
			}
			if c == 0 || img.alloc.metadata.kind(c) == metadataSole {
				continue // checkL1Entry refuses it when it is used
			}
			if err := img.alloc.metadata.add(format.Run{First: c, N: 1}, kind); err != nil {
				return fmt.Errorf("L1 entry %d: %w", i, err)
			}
		}
		return nil
	}
	if err := note(img.l1); err != nil {
		return err
	}
	scan := int64(maxScan)
	for i := range img.rows {
		row := &img.rows[i]
		if scan -= row.L1Size * 8; scan < 0 {
			break
		}
		l1, err := img.snapshotL1(row)
		if errors.Is(err, ErrCorrupt) {
			continue // whoever uses the snapshot is told
		}
		if err != nil {
			return err
		}
		if err := note(l1); err != nil {
			return fmt.Errorf("snapshot %q: %w", row.Name, err)
		}
	}
	return nil
}

// Close ends a running operation on snapshots early, flushes, returns what was reserved and closes the file. After a failure it
// only closes the file. The image's views are closed before it.
func (img *Image) Close() error {
	img.closing.Store(true)
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	img.gate.Lock()
	defer img.gate.Unlock()
	if img.closed {
		return fmt.Errorf("close %s: %w", img.f.Name(), ErrClosed)
	}
	img.closed = true
	img.background.Wait()
	var err error
	if !img.readOnly {
		if err = img.commit(); err == nil && img.f.Changed() && img.corrupt.Load() == nil {
			if err = img.alloc.close(); err == nil {
				host.Vouch(img.f.File)
			}
		}
	}
	return errors.Join(err, img.f.Close())
}

// Package qcow2 reads and writes QEMU's qcow2 images, versions 2 and 3, and takes, restores and deletes
// their internal snapshots.
//
// A file becomes an image by Create, and is used by Open:
//
//	f, err := qcow2.OpenFile(path, false) // with the locks that QEMU takes
//	img, err := qcow2.Open(f, qcow2.OpenOptions{}) // closes f when it fails
//	n, err := img.WriteAt(data, off)
//	err = img.Flush() // now it is durable
//	s, err := img.CreateSnapshot(ctx, "before the upgrade", nil)
//	err = img.GotoSnapshot(ctx, qcow2.ByID(s.ID))
//	err = img.Close()
//
// What takes long ends early with its context, and an operation on snapshots or on the size also when the image is closed: what is
// not complete has changed nothing then.
//
// What a guest has written since the last Flush may be lost in a power cut. Clone copies a disk or a snapshot to an image of its own, Check and Repair look at files that cannot be opened
// any more, Probe at a file whoever uses it. Offsets and lengths are bytes.
//
// After a crash at any point an image opens, each listed snapshot and the active content are exactly what they
// were or what they were to become, and everything flushed is there. To that end writes follow a fixed
// order: see reserve.go (reservation), commit.go (guest flush) and generation.go (snapshot operations).
package qcow2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/fsck"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/lock"
)

// Image is an open image. Its methods are safe for concurrent use; requests that overlap are ordered
// somehow, and each takes effect whole.
type Image struct {
	f        *host.Syncer
	direct   host.DirectIO // f, nil if its I/O goes through the page cache
	g        format.Geometry
	readOnly bool
	version  int
	packed   format.Decompressor
	makeRoom func() error // see OpenOptions
	alloc    *allocator   // nil if read-only
	failure  atomic.Pointer[error]
	corrupt  atomic.Pointer[error] // why nothing may be written any more

	// docs/internals.md says in which order locks are taken. changeMu: held by the running operation on snapshots or size.
	changeMu lock.Mutex[lock.Change]
	phases   phases      // of that operation
	closing  atomic.Bool // such an operation is to end early

	// gate: guest requests hold it shared, whatever needs them to stop
	// (snapshots, resize, close) exclusively. It guards closed and the header's size.
	gate   lock.RWMutex[lock.Gate]
	closed bool

	guests   *rangeLock              // guest clusters in use by requests
	tableMu  lock.Mutex[lock.Table]  // held while the active state gets an L2 table of its own
	commitMu lock.Mutex[lock.Commit] // held by the running commit

	mu        lock.Mutex[lock.Mapping] // guards all below
	l1        []format.L1Entry         // the active L1 table
	l1Dirty   format.SectorSet
	l2        *l2Cache
	loading   map[int64]chan struct{} // L2 tables that are being read, by L1 index; closed when they are
	dirty     int                     // tables that have changed since the last commit, at least
	preserved []format.MetaWrite      // sectors of L2 tables as they were when a snapshot was taken, for the next commit
	freed     format.Runs             // no longer referenced in memory; released after the next commit (I4)
	relieving bool                    // a commit in the background is due or under way
	releasing bool                    // a flush was answered before what it frees is released
	barrier   bool                    // data and copied tables must be durable before the mapping is written
	started   uint64                  // commits
	completed uint64                  // the latest commit that succeeded
	rows      []format.SnapshotRow
	rowBytes  int64          // length of the snapshot table
	views     map[string]int // open views by snapshot ID
	build     *generation    // of the running operation, nil if there is none
	redo      *RedoLog       // nil: none is kept; set by open

	requests   atomic.Int64   // of guests so far
	background sync.WaitGroup // commits and reservations that no guest waits for; begun with gate held

	hdrMu lock.Mutex[lock.Header] // held while the header is switched
	hdr   atomic.Pointer[format.Header]
}

// Size returns the size of the active disk in bytes.
func (img *Image) Size() int64 { return img.hdr.Load().Size }

// ClusterSize returns the cluster size in bytes.
func (img *Image) ClusterSize() int64 { return img.g.ClusterSize }

// DropCache gives up the memory of L2 tables and refcount blocks that are in the file as they are: the next requests read
// them again.
func (img *Image) DropCache() {
	img.mu.Lock()
	img.l2.dropClean()
	img.mu.Unlock()
	if img.readOnly {
		return
	}
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	img.alloc.rc.dropClean(0)
}

// Info describes an image.
type Info struct {
	Version         int
	ClusterSize     int64 // bytes
	Size            int64 // of the active disk, bytes
	FileSize        int64 // length of the file, bytes
	RefcountBits    int
	CorruptBit      bool
	DirtyBit        bool
	LazyRefcounts   bool
	ExtendedL2      bool
	CompressionType string
	Snapshots       []Snapshot // in table order
}

// compressionName is QEMU's name of a compression type.
func compressionName(kind uint8) string {
	if kind == format.CompressionZstd {
		return "zstd"
	}
	return "zlib"
}

// Info describes the image as it is now.
func (img *Image) Info() Info {
	h := img.hdr.Load()
	length, _ := img.f.Size() // 0 if it cannot be had: this is for people
	return Info{
		Version: h.Version, ClusterSize: img.g.ClusterSize, Size: h.Size, FileSize: length,
		RefcountBits: 1 << h.RefcountOrder, CompressionType: compressionName(h.CompressionType), Snapshots: img.Snapshots(),
		CorruptBit: h.Incompatible&format.IncompatCorrupt != 0, DirtyBit: h.Incompatible&format.IncompatDirty != 0,
		LazyRefcounts: h.Compatible&format.CompatLazyRefcounts != 0, ExtendedL2: h.Incompatible&format.IncompatExtendedL2 != 0,
	}
}

// begin lets a request in: gate is held shared until end. It checks that n bytes at off lie on the disk.
//
// A request on the active disk is begin and end; within them Chunks, the parts in one L2 table each, or Parts, in one cluster
// each; for each of them lock, and under it mappedEntries to look or entries to change; and judge for an error that says that the
// image is corrupt. What writes does it withSpace, and relieves the image of its changes when they are many. See read and zero.
func (img *Image) begin(off, n int64, write bool) error {
	img.requests.Add(1)
	img.gate.RLock()
	err := img.usable(write)
	if size := img.Size(); err == nil && (off < 0 || n < 0 || off > size || n > size-off) {
		err = fmt.Errorf("%s: %w: %d bytes at %d of a disk of %d", img.f.Name(), ErrOutOfRange, n, off, size)
	}
	if err != nil {
		img.gate.RUnlock()
	}
	return err
}

func (img *Image) end() { img.gate.RUnlock() }

// usable is called with gate held.
func (img *Image) usable(write bool) error {
	switch {
	case img.closed:
		return fmt.Errorf("%s: %w", img.f.Name(), ErrClosed)
	case write && img.readOnly:
		return fmt.Errorf("%s: %w", img.f.Name(), ErrReadOnly)
	case write && img.corrupt.Load() != nil:
		return *img.corrupt.Load()
	}
	return img.failed()
}

// fail makes every later operation fail: what is on disk is unknown until the image is opened again.
func (img *Image) fail(cause error) error {
	err := fmt.Errorf("%s: %w: %w", img.f.Name(), ErrFailed, cause)
	img.failure.CompareAndSwap(nil, &err)
	return err
}

func (img *Image) failed() error {
	if p := img.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// judge returns err. One that says that metadata is impossible ends all writing, durably: the next write could make more of
// it wrong. Reading goes on, and so do flushes of what has been written before.
func (img *Image) judge(err error) error {
	if err == nil || img.readOnly || !errors.Is(err, ErrCorrupt) || errors.Is(err, format.ErrContent) {
		return err
	}
	host.Disown(img.f.File)
	cause := fmt.Errorf("%w; nothing is written any more; %w", err, fsck.ErrNeedsRepair)
	if !img.corrupt.CompareAndSwap(nil, &cause) || img.version < 3 {
		return err // version 2 has no bit for it
	}
	return errors.Join(err, img.switchHeader(func(h *format.Header) { h.Incompatible |= format.IncompatCorrupt }))
}

// sync makes all writes durable. After a failure nothing can be said about any of them.
func (img *Image) sync() error {
	if err := img.failed(); err != nil {
		return err
	}
	if err := img.f.Sync(); err != nil {
		return img.fail(fmt.Errorf("sync: %w", err))
	}
	return nil
}

// switchHeader changes the generation of the metadata durably, by a write of one sector (C3). All that the new
// header selects must be durable.
func (img *Image) switchHeader(change func(*format.Header)) error {
	img.hdrMu.Lock()
	defer img.hdrMu.Unlock()
	if err := img.failed(); err != nil {
		return err
	}
	h := *img.hdr.Load()
	change(&h)
	sector := h.Encode()
	if _, err := img.f.WriteAt(sector, 0); err != nil {
		return img.fail(fmt.Errorf("write the header: %w", err))
	}
	if err := img.sync(); err != nil {
		return err
	}
	copy(h.Sector[:], sector)
	img.hdr.Store(&h)
	return nil
}

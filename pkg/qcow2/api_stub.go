package qcow2

import "context"

// ===== TEMPORARY: signatures others build against; replaced by the real files. =====

type CreateOptions struct {
	ClusterSize int64 // bytes, a power of two from 512 to 2 MiB; 0 = DefaultClusterSize (64 KiB)
	Version     int   // 2 or 3; 0 = 3
}

// Create writes an empty image of size virtual bytes into f, which must be empty, and syncs it.
func Create(f File, size int64, o CreateOptions) error { panic("stub") }

type OpenOptions struct {
	ReadOnly    bool
	L2CacheSize int64 // bytes; 0 = 32 MiB
}

// Open takes ownership of f: Close closes it (also when Open fails).
func Open(f File, o OpenOptions) (*Image, error) { panic("stub") }

type Image struct{}

func (img *Image) Size() int64                              { panic("stub") }
func (img *Image) ClusterSize() int64                       { panic("stub") }
func (img *Image) ReadAt(p []byte, off int64) (int, error)  { panic("stub") }
func (img *Image) WriteAt(p []byte, off int64) (int, error) { panic("stub") }
func (img *Image) WriteZeroes(off, n int64) error           { panic("stub") } // reads as zeros; allocation kept
func (img *Image) Discard(off, n int64) error               { panic("stub") } // reads as zeros; whole clusters freed
func (img *Image) Flush() error                             { panic("stub") }
func (img *Image) Resize(size int64) error                  { panic("stub") } // grow only
func (img *Image) Close() error                             { panic("stub") } // flushes
func (img *Image) Info() Info                               { panic("stub") }

// Info describes an image.
type Info struct {
	Version                                         int
	ClusterSize                                     int64
	Size                                            int64 // virtual
	FileSize                                        int64 // length of the file
	RefcountBits                                    int
	CorruptBit, DirtyBit, LazyRefcounts, ExtendedL2 bool
	CompressionType                                 string
	Snapshots                                       []Snapshot
}

func (img *Image) Snapshots() []Snapshot                     { panic("stub") } // in table order
func (img *Image) FindSnapshot(s Selector) (Snapshot, error) { panic("stub") } // ErrNotFound
// CreateSnapshot: ErrExists if the name is taken. cut, when not nil, is called once, at the instant
// whose state the snapshot holds, as soon as the guest's I/O could go on (thaw there).
func (img *Image) CreateSnapshot(name string, cut func()) (Snapshot, error) { panic("stub") }
func (img *Image) GotoSnapshot(s Selector) error                            { panic("stub") }
func (img *Image) DeleteSnapshot(s Selector) error                          { panic("stub") } // ErrInUse while a View of it is open; ErrNotFound
// DropActive discards all of the active state (tombstones): the snapshots stay.
func (img *Image) DropActive() error { panic("stub") }

// View reads one state of an image: the active one, or a snapshot with its own disk size.
func (img *Image) OpenSnapshot(s Selector) (*View, error) { panic("stub") }
func (img *Image) Active() *View                          { panic("stub") }

type View struct{}

func (v *View) Size() int64                             { panic("stub") }
func (v *View) ReadAt(p []byte, off int64) (int, error) { panic("stub") }
func (v *View) Close() error                            { panic("stub") }

// Extents calls fn for each extent from off on, in order, merged as far as possible; the whole disk is covered.
func (v *View) Extents(off int64, fn func(Extent) error) error { panic("stub") }

type ExtentKind int

const (
	Unallocated ExtentKind = iota // reads as zeros
	Zero                          // reads as zeros, marked so; Host may be set (allocated)
	Data
	Compressed
)

type Extent struct {
	Offset, Length int64
	Kind           ExtentKind
	Host           int64 // file offset of the data; -1 if none
}

// Clone writes into dst, an empty file, a standalone image whose content is v's: fresh metadata, data
// taken over run by run (reflinked where the file system can, else copied; zeros stay holes), of size
// virtual bytes (at least v's; 0: v's own). progress may be nil.
func Clone(ctx context.Context, dst File, v *View, size int64, progress func(done, total int64)) error {
	panic("stub")
}

// Check. Result.ExitStatus(): as qemu-img check: 0, 2 corrupt, 3 leaks.
func (img *Image) Check(ctx context.Context, progress func(done, total int64)) (CheckResult, error) {
	panic("stub")
}

type CheckResult struct {
	Corruptions, Leaks  int64
	Problems            []string // the first 1000, each says what and where
	Clusters, Allocated int64
	ImageEnd            int64
}

func (r CheckResult) ExitStatus() int { panic("stub") }

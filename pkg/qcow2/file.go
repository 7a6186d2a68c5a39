package qcow2

import (
	"os"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// File is all that an image needs of the file it lives in: `go doc ./pkg/qcow2/internal/host File` lists its methods.
type File = host.File

// An Allocator is a File that can take blocks ahead of need.
type Allocator = host.Allocator

// A RangeCloner is a File that can take over a part of another one without copying it.
type RangeCloner = host.RangeCloner

// OpenFile opens the regular file at path and takes the byte locks that QEMU takes for an image, so that
// one writer, or any number of readers, of either kind have it. It fails at once: ErrInUse when somebody
// else has the file in a way that excludes this one, fs.ErrNotExist when there is none.
//
// A symbolic link at path is followed, as QEMU's tools do; who must not follow one looks first.
func OpenFile(path string, readOnly bool) (File, error) { return host.OpenFile(path, readOnly) }

// CreateFile creates path, readable by its owner alone, and opens it for writing as OpenFile does.
// ErrExists when there is anything at path. Its directory is the caller's to sync.
func CreateFile(path string) (File, error) { return host.CreateFile(path) }

// NewFile uses a regular file that is open, and takes ownership of it. It takes the byte locks that OpenFile takes.
func NewFile(f *os.File, readOnly bool) (File, error) { return host.NewFile(f, readOnly) }

// OpenDirectFile is OpenFile for writing, past the page cache if the file system says how: in blocks of 512 bytes, or of 4 KiB on
// a disk with such sectors, or where XFS shares the file's blocks with another. Writes of parts of a block do not mix with others
// of that block, unless these are parts, too.
func OpenDirectFile(path string) (File, error) { return host.OpenDirectFile(path) }

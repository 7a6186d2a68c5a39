package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// A mounted file system is frozen for the instant of a snapshot. The kernel keeps it frozen after
// whoever froze it has died, so the freeze belongs to the supervisor, not to the worker: the worker may
// die at any moment, and the supervisor, which notices, still holds the directory to thaw it by. If the
// supervisor dies too, a marker file beside the image tells the next one.
//
// The order is: marker, syncfs, FIFREEZE, then the worker's cut, FITHAW, marker away. The worker must not
// stop I/O before FIFREEZE has returned, since FIFREEZE itself writes to the device.

const (
	fiFreeze = 0xC0045877 // FIFREEZE, _IOWR('X', 119, int)
	fiThaw   = 0xC0045878 // FITHAW, _IOWR('X', 120, int)

	// maxFrozen is how long a file system may stay frozen if no cut comes.
	maxFrozen = 30 * time.Second
)

// freeze is one file system held frozen.
type freeze struct {
	dir    *os.File
	volume string
	marker string
	// foreign: somebody else had frozen the file system already, and will thaw it.
	foreign bool
	since   time.Time
	limit   *time.Timer
	thawing sync.Once
	// lasted is how long it was frozen. Read after thaw.
	lasted time.Duration
	// lost: it was thawed by the limit, or by somebody else, before thaw was called. Read after thaw.
	lost error
}

// freezeFS freezes the file system of dir, which must be mounted from device, for at most limit. The caller
// calls thaw.
func freezeFS(p *pool.Pool, volume, device string, dir *os.File, limit time.Duration) (*freeze, error) {
	fsType, err := fsTypeOn(device, dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFreeze, err)
	}
	f := &freeze{dir: dir, volume: volume, marker: markerPath(p, volume)}
	if err := writeMarker(f.marker, marker{Device: device, FSType: fsType}); err != nil {
		return nil, fmt.Errorf("%w: marker: %w", ErrFreeze, err)
	}
	fd := int(dir.Fd())
	if err := unix.Syncfs(fd); err != nil {
		f.removeMarker()
		return nil, fmt.Errorf("%w: syncfs: %w", ErrFreeze, err)
	}
	err = unix.IoctlSetInt(fd, fiFreeze, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		f.foreign = true
		f.removeMarker()
		klog.InfoS("File system is frozen by somebody else, who will thaw it", "volume", volume)
	case err != nil:
		f.removeMarker()
		return nil, fmt.Errorf("%w: FIFREEZE: %w", ErrFreeze, err)
	default:
		f.since = time.Now()
		f.limit = time.AfterFunc(limit, func() {
			f.end(fmt.Errorf("%w: no snapshot within %v", ErrFreeze, limit))
		})
	}
	return f, nil
}

// thaw lets the file system go on. It returns nil if it was frozen until now. Further calls do nothing.
func (f *freeze) thaw() error {
	if f == nil {
		return nil
	}
	f.end(nil)
	return f.lost
}

func (f *freeze) end(reason error) {
	f.thawing.Do(func() {
		if f.foreign {
			return
		}
		f.limit.Stop()
		f.lost = reason
		switch err := unix.IoctlSetInt(int(f.dir.Fd()), fiThaw, 0); {
		case errors.Is(err, unix.EINVAL):
			f.lost = fmt.Errorf("%w: somebody thawed it before the snapshot", ErrFreeze)
		case err != nil:
			// The marker stays: the next engine tries again.
			klog.ErrorS(err, "File system stays frozen", "volume", f.volume)
			return
		}
		f.lasted = time.Since(f.since)
		klog.InfoS("File system was frozen", "volume", f.volume, "duration", f.lasted)
		f.removeMarker()
	})
}

func (f *freeze) removeMarker() {
	if err := os.Remove(f.marker); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Freeze marker stays", "volume", f.volume)
	}
}

// fsTypeOn returns the type of the file system of dir, having made sure that it lies on device: a
// freeze of any other one, the node's root perhaps, would be a disaster.
func fsTypeOn(device string, dir *os.File) (string, error) {
	var onDisk, block unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &onDisk); err != nil {
		return "", err
	}
	if err := unix.Stat(device, &block); err != nil {
		return "", fmt.Errorf("%s: %w", device, err)
	}
	if onDisk.Dev != block.Rdev {
		return "", fmt.Errorf("the directory is not on %s", device)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return "", err
	}
	switch fs.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4", nil
	case unix.XFS_SUPER_MAGIC:
		return "xfs", nil
	}
	return "", fmt.Errorf("file system type %#x on %s is not known", fs.Type, device)
}

// marker is the content of the marker file: what a later engine needs to find the file system by.
type marker struct {
	Device string `json:"device"`
	FSType string `json:"fsType"`
}

func markerPath(p *pool.Pool, volume string) string {
	return filepath.Join(filepath.Dir(p.ImagePath(volume)), "frozen")
}

// writeMarker makes the marker durable.
func writeMarker(path string, m marker) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}

// readMarker returns the marker at path. It is empty if there is none, or one that was never finished:
// then nothing was frozen.
func readMarker(path string) (m marker, err error) {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return marker{}, err
	}
	if !json.Valid(data) {
		return marker{}, nil
	}
	return m, json.Unmarshal(data, &m)
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

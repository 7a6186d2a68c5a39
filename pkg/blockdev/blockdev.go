// Package blockdev makes a kernel block device out of anything that can be read and written at an
// offset: a FUSE file system with one file, and a loop device with direct I/O on it.
package blockdev

import "errors"

// Backend is what a device serves. All methods are called concurrently.
type Backend interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// WriteZeroes makes n bytes at off read as zeros and keeps their allocation.
	WriteZeroes(off, n int64) error
	// Discard makes n bytes at off read as zeros and gives up what it can of their allocation.
	Discard(off, n int64) error
	// Flush makes all completed writes durable.
	Flush() error
	// Size returns the length in bytes, a multiple of the logical block size.
	Size() int64
}

// Options of a device.
type Options struct {
	// Name is what LOOP_GET_STATUS64 reports as the device's file name, at most 63 bytes: it marks
	// the device as ours and says which volume it is, also after its server has died.
	Name string
	// LogicalBlockSize in bytes; 0 = 512.
	LogicalBlockSize int
	// DiscardGranularity in bytes, the cluster size of an image; 0 = 4096.
	DiscardGranularity int
	ReadOnly           bool
	// Errno maps a Backend's error to what the guest sees; nil, or an answer of 0: EIO.
	Errno func(error) uintptr
}

// ErrBusy is returned by Detach, and by Clear, while something has the device open. Nothing was changed.
var ErrBusy = errors.New("device is in use")

// Device is an attached block device.
type Device struct{}

// Attach serves b as a block device until Detach. It fails where the kernel cannot do direct I/O on it.
func Attach(b Backend, o Options) (*Device, error) { panic("stub") }

// Path returns the device's path, /dev/loopN.
func (d *Device) Path() string { panic("stub") }

// Resize tells the kernel that the backend's size has changed.
func (d *Device) Resize() error { panic("stub") }

// Detach removes the device: when it returns nil the kernel has let go of it, every request has been
// answered, and the backend is no longer called. ErrBusy while something has the device open.
func (d *Device) Detach() error { panic("stub") }

// Abort ends the FUSE connection: whoever uses the device gets I/O errors from now on. The loop
// device goes when its last user closes it.
func (d *Device) Abort() error { panic("stub") }

// Done is closed when the connection has ended, for whatever reason.
func (d *Device) Done() <-chan struct{} { panic("stub") }

// Info describes a loop device of the machine that carries a Name of ours.
type Info struct {
	Path string // /dev/loopN
	Name string
	Size int64 // bytes
}

// Find returns the loop devices whose Name begins with prefix, their servers alive or not.
func Find(prefix string) ([]Info, error) { panic("stub") }

// Clear removes a loop device whose server is dead; finished when it returns nil. ErrBusy while something has
// it open: the kernel removes it at the last close all the same.
func Clear(path string) error { panic("stub") }

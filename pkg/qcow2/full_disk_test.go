package qcow2

import (
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
)

// This file fills the disk under an image while an operation on snapshots runs.

// TestFullDiskForGuest: a guest that meets a full disk ends the creation of a snapshot, which takes space, and waits for a
// deletion, which gives some.
func TestFullDiskForGuest(t *testing.T) {
	for name, c := range map[string]struct {
		op   func(*Image) error
		want error
	}{
		"create": {func(img *Image) error { _, err := img.CreateSnapshot(t.Context(), "two", nil); return err }, ErrNoSpace},
		"delete": {func(img *Image) error { return img.DeleteSnapshot(t.Context(), ByName("one")) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile("full")
			must(t, Create(t.Context(), f, 4<<20, CreateOptions{ClusterSize: 512}))
			img, err := Open(f, OpenOptions{})
			must(t, err)
			img.alloc.ahead = true // no reservation in the background meets the full disk instead of the guest
			write := func(count int, off, n int64) error {
				_, err := img.WriteAt(stamp(count, off, n), off)
				return err
			}
			must(t, write(1, 0, 4096))
			_, err = img.CreateSnapshot(t.Context(), "one", nil)
			must(t, err)
			must(t, img.alloc.endReservation())

			met, written := make(chan struct{}), make(chan error, 1)
			var started, full atomic.Bool
			f.setFault(func(c fileCall) error {
				if c.kind != callTruncate || !full.CompareAndSwap(true, false) {
					return nil
				}
				close(met)
				return ErrNoSpace
			})
			f.between = func() {
				if started.Load() || img.build == nil || !img.idle() || !started.CompareAndSwap(false, true) {
					return
				}
				full.Store(true)
				go func() { written <- write(2, 0, 4<<20) }() // more than can be reserved at once
				<-met
				for n := img.build; c.want != nil && n.cancelled.Load() == nil; {
					runtime.Gosched() // or the operation ends before the guest ends it
				}
			}
			if err := c.op(img); !errors.Is(err, c.want) {
				t.Errorf("the operation: %v, want %v", err, c.want)
			}
			if !started.Load() {
				t.Fatal("the guest never wrote")
			}
			if err := <-written; err != nil {
				t.Errorf("the guest: %v", err)
			}
			f.between = nil
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// fullFile is a file on a disk that is full until somebody makes room.
type fullFile struct {
	*memFile
	room bool
}

func (f *fullFile) Allocate(off, n int64) error {
	if !f.room {
		return ErrNoSpace
	}
	return f.Truncate(max(off+n, f.content.size))
}

// TestDeleteInRoom deletes a snapshot from a full disk: in the room that is made for it, and not without.
func TestDeleteInRoom(t *testing.T) {
	noRoom := errors.New("nobody gives anything")
	for name, c := range map[string]struct {
		makeRoom func(*fullFile) func() error
		want     error
	}{
		"made":      {func(f *fullFile) func() error { return func() error { f.room = true; return nil } }, nil},
		"not made":  {func(*fullFile) func() error { return func() error { return noRoom } }, noRoom},
		"too small": {func(*fullFile) func() error { return func() error { return nil } }, ErrNoSpace},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fullFile{memFile: newMemFile("full")}
			must(t, Create(t.Context(), f, 256<<10, CreateOptions{ClusterSize: 512}))
			img, err := Open(f, OpenOptions{MakeRoom: c.makeRoom(f)})
			must(t, err)
			_, err = img.WriteAt(stamp(1, 0, 128<<10), 0)
			must(t, err)
			_, err = img.CreateSnapshot(t.Context(), "one", nil)
			must(t, err)
			must(t, img.alloc.endReservation())
			f.setFault(func(c fileCall) error {
				if !f.room && (c.kind == callTruncate && c.n > f.content.size || c.kind == callWrite && c.off+c.n > f.content.size) {
					return ErrNoSpace
				}
				return nil
			})
			// The holes in the file are taken, too.
			img.alloc.mu.Lock()
			img.alloc.next = img.g.ClusterBehind(img.alloc.fileEnd())
			img.alloc.mu.Unlock()
			if err := img.DeleteSnapshot(t.Context(), ByName("one")); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if left := len(img.Snapshots()); (left == 0) != (c.want == nil) {
				t.Errorf("%d snapshots are left", left)
			}
			f.setFault(nil)
			must(t, img.Close())
			if r, err := checkFile(t.Context(), f.reopen()); err != nil || r.ExitStatus() != 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

package qcow2_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// newImage creates an image of 1 GiB in a directory of its own, and opens it. done closes it and removes the directory.
func newImage(ctx context.Context) (img *qcow2.Image, path string, done func() error, err error) {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		return nil, "", nil, err
	}
	path = filepath.Join(dir, "disk.qcow2")
	f, err := qcow2.CreateFile(path)
	if err != nil {
		return nil, "", nil, err
	}
	if err := qcow2.Create(ctx, f, 1<<30, qcow2.CreateOptions{}); err != nil {
		return nil, "", nil, errors.Join(err, f.Close())
	}
	img, err = qcow2.Open(f, qcow2.OpenOptions{})
	return img, path, func() error { return errors.Join(img.Close(), os.RemoveAll(dir)) }, err
}

// An image is created in an empty file, and opened. What is written is durable after the next flush.
func ExampleCreate() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	f, err := qcow2.CreateFile(filepath.Join(dir, "disk.qcow2"))
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := qcow2.Create(context.Background(), f, 1<<30, qcow2.CreateOptions{}); err != nil {
		fmt.Println(err, f.Close())
		return
	}
	img, err := qcow2.Open(f, qcow2.OpenOptions{}) // it owns f from now on
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = img.WriteAt([]byte("hello"), 4096)
	fmt.Println(img.Size(), errors.Join(err, img.Flush(), img.Close()))
	// Output: 1073741824 <nil>
}

// A snapshot keeps what the disk holds when it is taken, whatever is written afterwards.
func ExampleImage_CreateSnapshot() {
	img, _, done, err := newImage(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	_, before := img.WriteAt([]byte("before"), 0)
	_, err = img.CreateSnapshot(context.Background(), "monday", nil)
	_, after := img.WriteAt([]byte("after!"), 0)
	if err := errors.Join(before, err, after); err != nil {
		fmt.Println(err)
		return
	}
	view, err := img.OpenSnapshot(qcow2.ByName("monday"))
	if err != nil {
		fmt.Println(err)
		return
	}
	p := make([]byte, 6)
	_, err = view.ReadAt(p, 0)
	fmt.Println("snapshot:", string(p), errors.Join(err, view.Close()))
	_, err = img.ReadAt(p, 0)
	fmt.Println("disk:", string(p), errors.Join(err, done()))
	// Output:
	// snapshot: before <nil>
	// disk: after! <nil>
}

// Snapshots are listed in the order in which they were taken. One that is deleted gives back what nothing else needs.
func ExampleImage_DeleteSnapshot() {
	img, _, done, err := newImage(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, name := range []string{"monday", "tuesday"} {
		if _, err := img.CreateSnapshot(context.Background(), name, nil); err != nil {
			fmt.Println(err)
			return
		}
	}
	err = img.DeleteSnapshot(context.Background(), qcow2.ByName("monday"))
	for _, s := range img.Snapshots() {
		fmt.Println(s.ID, s.Name, s.DiskSize)
	}
	again := img.DeleteSnapshot(context.Background(), qcow2.ByName("monday"))
	fmt.Println(err, errors.Is(again, qcow2.ErrNotFound), done())
	// Output:
	// 2 tuesday 1073741824
	// <nil> true <nil>
}

// A check reads all metadata of an image that nobody has open for writing, and says what it finds.
func ExampleCheck() {
	img, path, done, err := newImage(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = img.WriteAt(make([]byte, 1<<20), 0)
	if err := errors.Join(err, img.Close()); err != nil {
		fmt.Println(err)
		return
	}
	f, err := qcow2.OpenFile(path, true)
	if err != nil {
		fmt.Println(err)
		return
	}
	r, err := qcow2.Check(context.Background(), f, nil)
	fmt.Println(r.Corruptions, r.Leaks, r.Allocated, errors.Join(err, f.Close()))
	_ = done() // the image is closed
	// Output: 0 0 16 <nil>
}

package engine

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// slowDisk is a disk on which writes of a marker wait.
type slowDisk struct {
	*os.File
	marker  []byte
	waiting chan struct{} // receives when one waits
	release chan struct{} // closed when it need not any more
}

func (d *slowDisk) WriteAt(p []byte, off int64) (int, error) {
	if bytes.Contains(p, d.marker) {
		d.waiting <- struct{}{}
		<-d.release
	}
	return d.File.WriteAt(p, off)
}

func (d *slowDisk) WriteZeroes(off, n int64) error { return d.Discard(off, n) }

func (d *slowDisk) Discard(off, n int64) error {
	_, err := d.File.WriteAt(make([]byte, n), off)
	return err
}

func (d *slowDisk) Flush() error { return nil }

func (d *slowDisk) Size() int64 { return 64 * mib }

// A write to a new cluster that the disk is slow with keeps nobody else from the image. With pwrite(2), ext4 would: it holds
// the file's lock until blocks that it has allocated are written.
func TestWriteToNewClusterHoldsUpNobody(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	must(t, err)
	defer file.Close()
	disk := &slowDisk{file, bytes.Repeat([]byte("slow"), 1024), make(chan struct{}), make(chan struct{})}
	must(t, file.Truncate(disk.Size()))
	device, err := blockdev.Attach(disk, blockdev.Options{Name: devicePrefix + testVolumePrefix + strconv.Itoa(os.Getpid()) + "-slow"})
	must(t, err)
	t.Cleanup(func() { must(t, device.Detach()) })
	run(t, "mkfs.ext4", "-q", "-E", "nodiscard", device.Path())
	path := filepath.Join(mount(t, device.Path(), "ext4"), "image")

	f, err := qcow2.CreateFile(path)
	must(t, err)
	must(t, qcow2.Create(f, 16*mib, qcow2.CreateOptions{}))
	must(t, f.Close())
	f, err = qcow2.OpenDirectFile(path)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{})
	must(t, err)
	defer img.Close()
	block := aligned(t, 4096)
	_, err = img.WriteAt(block, 0)
	must(t, err)

	var direct qcow2.Direct // as if the event loop were reading
	if _, ok := img.StartDirect(&direct, 0, 4096, false); !ok {
		t.Fatal("not direct")
	}
	defer img.EndDirect(&direct, false)
	release := sync.OnceFunc(func() { close(disk.release) })
	defer release()
	written, read := make(chan error, 1), make(chan error, 1)
	slow := aligned(t, 4096)
	copy(slow, disk.marker)
	go func() {
		_, err := img.WriteAt(slow, 8*mib)
		written <- err
	}()
	<-disk.waiting
	go func() {
		_, err := img.ReadAt(block, 0)
		read <- err
	}()
	eventually(t, "another cluster is read meanwhile", func() bool { return len(read) > 0 })
	release()
	must(t, <-written)
	must(t, <-read)
}

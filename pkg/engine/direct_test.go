package engine

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/blockdev"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
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
	device, err := blockdev.Attach(disk, blockdev.Options{Name: worker.DevicePrefix + testVolumePrefix + strconv.Itoa(os.Getpid()) + "-slow"})
	must(t, err)
	t.Cleanup(func() { must(t, device.Detach()) })
	run(t, "mkfs.ext4", "-q", "-E", "nodiscard", device.Path())
	path := filepath.Join(mount(t, device.Path(), "ext4"), "image")

	f, err := qcow2.CreateFile(path)
	must(t, err)
	must(t, qcow2.Create(t.Context(), f, 16*mib, qcow2.CreateOptions{}))
	must(t, f.Close())
	f, err = qcow2.OpenDirectFile(path)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{})
	must(t, err)
	defer checkImage(t, path)
	defer img.Close()
	block := aligned(4096)
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
	slow := aligned(4096)
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

// XFS wants whole blocks of 4 KiB past the page cache once a file shares some with a clone. The file is served that way all the
// same, also to users who write single sectors.
func TestSharedFile(t *testing.T) {
	const size = 256 * mib
	r := newDiskRig(t, 1024*mib)
	id := r.newVolume("a", size)
	fillDevice(t, r.attach(id), size*3/4, 16*mib, 1)
	clone := filepath.Join(r.dir, "clone")
	must(t, r.client.Clone(testContext(t), id, "", clone, 0))
	r.detach(id)

	device := r.attach(id)
	if !opensDirectly(t, r.find(id).WorkerPID, r.pool.ImagePath(id)) {
		t.Fatal("the image is served through the page cache")
	}
	l := startLoad(t, device, size/2, 2)
	sectors := []string{
		"--name=sectors", "--filename=" + device, "--rw=randwrite", fmt.Sprintf("--offset=%d", size/2), fmt.Sprintf("--size=%d", 8*mib),
		"--bsrange=512-8k", "--blockalign=512", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_state_save=0",
	}
	run(t, "fio", sectors...)
	must(t, unix.Kill(r.find(id).WorkerPID, unix.SIGKILL))
	run(t, "fio", sectors...)
	l.end(t)
	l.verify(t, device)
	r.detach(id)
	wantImage(t, clone, size*3/4, 16*mib, 1)
	checkImage(t, clone)
}

// opensDirectly tells whether a process has a file open past the page cache.
func opensDirectly(t *testing.T, pid int, path string) bool {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	must(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != path {
			continue
		}
		info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
		must(t, err)
		var pos, flags int64
		_, err = fmt.Sscanf(string(info), "pos: %d\nflags: %o", &pos, &flags)
		must(t, err)
		if flags&unix.O_DIRECT != 0 {
			return true
		}
	}
	return false
}

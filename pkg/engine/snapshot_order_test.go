package engine

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// While writers and fio are at work on a raw volume, 20 snapshots are created and deleted. There is no I/O
// error, and each snapshot holds everything that was acknowledged before its call, nothing that was issued after
// its answer, and with each write all those that were acknowledged before it was issued.
func TestSnapshotsWhileWriting(t *testing.T) {
	const (
		size      = 24 * mib
		stamped   = 8 * mib // the rest is fio's
		writers   = 4
		perWriter = stamped / stampedBlock / writers
		snapshots = 20
		kept      = 4 // until after the detach
	)
	r := newRig(t)
	id := r.newVolume("raw", size)
	device := r.attach(id)
	h := newHistory()
	var quit atomic.Bool
	var work sync.WaitGroup
	for w := range int64(writers) {
		f, buf := openDirect(t, device), aligned(stampedBlock)
		work.Go(func() { h.write(f, buf, w*perWriter, perWriter, &quit); f.Close() })
	}
	stopFio := startFio(t, device, stamped, size-stamped)
	defer work.Wait()
	defer quit.Store(true)

	type taken struct {
		name             string
		called, answered int64
	}
	var all []taken
	for i := range snapshots {
		s := taken{name: fmt.Sprintf("s%d", i)}
		from := h.clock.Load()
		r.eventually("there are new writes", func() bool { return h.clock.Load() > from+200 || h.failed.Load() != nil })
		s.called = h.now()
		_, err := r.client.CreateSnapshot(testContext(t), id, s.name, nil)
		must(t, err)
		s.answered = h.now()
		all = append(all, s)

		clone := filepath.Join(r.dir, s.name)
		must(t, r.client.Clone(testContext(t), id, s.name, clone, 0))
		if err := h.judge(readStamps(t, clone, stamped), s.called, s.answered); err != nil {
			t.Errorf("%s, cloned: %v", s.name, err)
		}
		if i >= kept {
			must(t, r.client.DeleteSnapshot(testContext(t), id, all[i-kept].name))
		}
	}
	quit.Store(true)
	work.Wait()
	stopFio()
	if err := h.failed.Load(); err != nil {
		t.Errorf("a writer failed: %v", *err)
	}
	r.detach(id)
	for _, s := range all[snapshots-kept:] {
		raw := filepath.Join(t.TempDir(), s.name)
		run(t, "qemu-img", "convert", "-l", s.name, "-O", "raw", r.pool.ImagePath(id), raw)
		f, err := os.Open(raw)
		must(t, err)
		if err := h.judge(stampsOf(t, f, stamped), s.called, s.answered); err != nil {
			t.Errorf("%s, exported by qemu-img: %v", s.name, err)
		}
		f.Close()
	}
	checkImage(t, r.pool.ImagePath(id))
	r.attach(id)
	for _, s := range all[snapshots-kept:] {
		must(t, r.client.DeleteSnapshot(testContext(t), id, s.name))
	}
	r.detach(id)
	end := h.now()
	if err := h.judge(readStamps(t, r.pool.ImagePath(id), stamped), end, end); err != nil {
		t.Errorf("the volume itself: %v", err)
	}
	t.Logf("%d writes, %d snapshots", end/2, snapshots)
}

// readStamps returns the stamps of an image that nobody has open.
func readStamps(t *testing.T, path string, size int64) map[int64]int {
	t.Helper()
	f, err := qcow2.OpenFile(path, true)
	must(t, err)
	img, err := qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	return stampsOf(t, img, size)
}

func stampsOf(t *testing.T, content io.ReaderAt, size int64) map[int64]int {
	t.Helper()
	stamps := map[int64]int{}
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += mib {
		_, err := content.ReadAt(buf, off)
		must(t, err)
		for i := int64(0); i < mib; i += stampedBlock {
			block := (off + i) / stampedBlock
			n, err := readStamp(buf[i:i+stampedBlock], block)
			must(t, err)
			stamps[block] = n
		}
	}
	return stamps
}

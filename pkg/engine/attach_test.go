package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/worker"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestAttachWriteDetachAttachRead(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", 64*mib)
	device := r.attach(id)
	if again := r.attach(id); again != device {
		t.Fatalf("attached again as %s, first as %s", again, device)
	}
	a := r.find(id)
	if a == nil || a.Device != device || a.Size != 64*mib || a.WorkerPID == 0 || a.Failure != "" {
		t.Fatalf("listed as %+v", a)
	}
	fillDevice(t, device, 3*mib, mib, 0x5a)
	r.detach(id)
	if a := r.find(id); a != nil {
		t.Fatalf("still listed: %+v", a)
	}
	wantImage(t, r.pool.ImagePath(id), 3*mib, mib, 0x5a)
	device = r.attach(id)
	wantDevice(t, device, 3*mib, mib, 0x5a)
	wantDevice(t, device, 4*mib, mib, 0)
	r.detach(id)
	r.detach(id) // idempotent
}

func TestUnknownVolumes(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	unknown := r.pool.NewID("unknown")
	_, err := r.client.Attach(ctx, unknown)
	wantErr(t, err, pool.ErrNotFound)
	must(t, r.client.Detach(ctx, unknown))
	_, err = r.client.CreateSnapshot(ctx, unknown, "s", nil)
	wantErr(t, err, pool.ErrNotFound)

	for _, bad := range []string{"", "..", "../../etc", "a/b", strings.Repeat("x", 300)} {
		_, err = r.client.Attach(ctx, bad)
		wantErr(t, err, pool.ErrBadID)
		wantErr(t, r.client.Detach(ctx, bad), pool.ErrBadID)
		_, err = r.client.Resize(ctx, bad, mib, 0)
		wantErr(t, err, pool.ErrBadID)
	}
}

func TestNotAttached(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	id := r.newVolume("a", mib)
	_, err := r.client.Resize(ctx, id, 2*mib, 0)
	wantErr(t, err, ErrNotAttached)
	_, err = r.client.CreateSnapshot(ctx, id, "s", nil)
	wantErr(t, err, ErrNotAttached)
	_, err = r.client.ListSnapshots(ctx, id)
	wantErr(t, err, ErrNotAttached)
	wantErr(t, r.client.DeleteSnapshot(ctx, id, "s"), ErrNotAttached)
	wantErr(t, r.client.Clone(ctx, id, "", filepath.Join(r.dir, "clone"), 0), ErrNotAttached)
}

func TestAttachTombstone(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", mib)
	lease, err := r.pool.Lock(id)
	must(t, err)
	must(t, lease.Update(func(v *pool.Volume) { v.Tombstone = true }))
	must(t, lease.Unlock())
	_, err = r.client.Attach(testContext(t), id)
	wantErr(t, err, ErrTombstone)
}

func TestAttachOfVolumeInUse(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", mib)
	lease, err := r.pool.Lock(id)
	must(t, err)
	_, err = r.client.Attach(testContext(t), id)
	wantErr(t, err, pool.ErrInUse)
	must(t, lease.Unlock())
	r.attach(id)
	_, err = r.pool.Lock(id)
	wantErr(t, err, pool.ErrInUse)
	r.detach(id)
	lease, err = r.pool.Lock(id)
	must(t, err)
	must(t, lease.Unlock())
}

// A corrupt volume fails alone.
func TestAttachCorruptImage(t *testing.T) {
	r := newRig(t)
	bad, good := r.newVolume("bad", mib), r.newVolume("good", mib)
	path := r.pool.ImagePath(bad)
	whole, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, make([]byte, len(whole)), 0o600))
	device := r.attach(good)
	_, err = r.client.Attach(testContext(t), bad)
	if err == nil {
		t.Fatal("attached an image of zeros")
	}
	t.Logf("answer: %v", err)
	fillDevice(t, device, 0, 4096, 1)
	must(t, os.WriteFile(path, whole, 0o600))
	r.attach(bad)
}

func TestConcurrentAttach(t *testing.T) {
	r := newRig(t)
	const volumes, callers = 10, 3
	var calls sync.WaitGroup
	var answers [volumes][callers]string
	var ids [volumes]string
	for v := range volumes {
		ids[v] = r.newVolume(fmt.Sprint(v), 8*mib)
		for c := range callers {
			calls.Go(func() {
				device, err := r.client.Attach(t.Context(), ids[v])
				if err != nil {
					t.Errorf("attach %d: %v", v, err)
				}
				answers[v][c] = device.Path
			})
		}
	}
	calls.Wait()
	seen := map[string]bool{}
	for v := range volumes {
		for c := range callers {
			if answers[v][c] != answers[v][0] {
				t.Errorf("volume %d is both %s and %s", v, answers[v][0], answers[v][c])
			}
		}
		if seen[answers[v][0]] {
			t.Errorf("%s is two volumes", answers[v][0])
		}
		seen[answers[v][0]] = true
	}
	if t.Failed() {
		return
	}
	for v := range volumes {
		calls.Go(func() { fillDevice(t, answers[v][0], 0, mib, byte(v+1)) })
	}
	calls.Wait()
	for v := range volumes {
		calls.Go(func() {
			if err := r.client.Detach(t.Context(), ids[v]); err != nil {
				t.Errorf("detach %d: %v", v, err)
			}
		})
	}
	calls.Wait()
	for v := range volumes {
		wantImage(t, r.pool.ImagePath(ids[v]), 0, mib, byte(v+1))
	}
}

func TestResize(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	id := r.newVolume("a", 8*mib)
	device := r.attach(id)
	for _, step := range []struct{ ask, want int64 }{{16 * mib, 16 * mib}, {12 * mib, 16 * mib}, {16 * mib, 16 * mib}} {
		size, err := r.client.Resize(ctx, id, step.ask, 0)
		must(t, err)
		if size != step.want {
			t.Fatalf("resize to %d answered %d", step.ask, size)
		}
		if got := strings.TrimSpace(run(t, "blockdev", "--getsize64", device)); got != fmt.Sprint(step.want) {
			t.Fatalf("device has %s bytes, want %d", got, step.want)
		}
	}
	fillDevice(t, device, 15*mib, mib, 7)
	r.detach(id)
	wantImage(t, r.pool.ImagePath(id), 15*mib, mib, 7)
}

func TestDetachWhileMounted(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", 64*mib)
	device := r.attach(id)
	run(t, "mkfs.ext4", "-q", device)
	dir := mount(t, device, "ext4")
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("before"), 0o600))
	wantErr(t, r.client.Detach(testContext(t), id), ErrInUse)
	must(t, os.WriteFile(file, []byte("after"), 0o600))
	unix.Sync()
	if a := r.find(id); a == nil || a.Failure != "" {
		t.Fatalf("listed as %+v", a)
	}
	must(t, unix.Unmount(dir, 0))
	r.detach(id)

	dir = mount(t, r.attach(id), "ext4")
	got, err := os.ReadFile(filepath.Join(dir, "file"))
	must(t, err)
	if string(got) != "after" {
		t.Fatalf("read %q", got)
	}
	must(t, unix.Unmount(dir, 0))
}

func TestSnapshotsOfAttachedVolume(t *testing.T) {
	r := newRig(t)
	ctx := testContext(t)
	id := r.newVolume("a", 16*mib)
	device := r.attach(id)
	fillDevice(t, device, 0, mib, 1)
	first, err := r.client.CreateSnapshot(ctx, id, "s1", nil)
	must(t, err)
	if first.Name != "s1" || first.DiskSize != 16*mib || first.Date.IsZero() || first.ID == "" {
		t.Fatalf("snapshot is %+v", first)
	}
	fillDevice(t, device, 0, mib, 2)
	again, err := r.client.CreateSnapshot(ctx, id, "s1", nil)
	must(t, err)
	if again != first {
		t.Fatalf("created again as %+v, first as %+v", again, first)
	}
	_, err = r.client.CreateSnapshot(ctx, id, "s2", nil)
	must(t, err)
	list, err := r.client.ListSnapshots(ctx, id)
	must(t, err)
	if len(list) != 2 || list[0] != first || list[1].Name != "s2" {
		t.Fatalf("listed: %+v", list)
	}
	must(t, r.client.DeleteSnapshot(ctx, id, "s2"))
	must(t, r.client.DeleteSnapshot(ctx, id, "s2"))
	for _, name := range []string{"", worker.ReservedPrefix + "x"} {
		_, err = r.client.CreateSnapshot(ctx, id, name, nil)
		wantErr(t, err, ErrInvalid)
		wantErr(t, r.client.DeleteSnapshot(ctx, id, name), ErrInvalid)
	}
	r.detach(id)

	raw := filepath.Join(t.TempDir(), "raw")
	run(t, "qemu-img", "convert", "-l", "s1", "-O", "raw", r.pool.ImagePath(id), raw)
	content, err := os.ReadFile(raw)
	must(t, err)
	if content[0] != 1 || content[mib-1] != 1 || content[mib] != 0 {
		t.Fatal("the snapshot does not hold what was there")
	}
	wantImage(t, r.pool.ImagePath(id), 0, mib, 2)
}

// The snapshot that an interrupted clone left goes at the next attach.
func TestAttachSweepsClones(t *testing.T) {
	r := newRig(t)
	id := r.newVolume("a", mib)
	lease, err := r.pool.Lock(id)
	must(t, err)
	img, err := lease.Open(false)
	must(t, err)
	for _, name := range []string{"mine", worker.ReservedPrefix + "left"} {
		_, err = img.CreateSnapshot(t.Context(), name, nil)
		must(t, err)
	}
	must(t, img.Close())
	must(t, lease.Unlock())
	r.attach(id)
	r.detach(id)
	f, err := qcow2.OpenFile(r.pool.ImagePath(id), true)
	must(t, err)
	img, err = qcow2.Open(f, qcow2.OpenOptions{ReadOnly: true})
	must(t, err)
	defer img.Close()
	if list := img.Snapshots(); len(list) != 1 || list[0].Name != "mine" {
		t.Fatalf("snapshots: %+v", list)
	}
}

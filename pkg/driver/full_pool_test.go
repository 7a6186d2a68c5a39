package driver

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

func initPool(t *testing.T, dir string) {
	t.Helper()
	must(t, pool.Init(dir))
}

// newSmallRig starts a node whose pool has a small file system of its own.
func newSmallRig(t *testing.T, size int64, o Options) *rig {
	t.Helper()
	r := newIdleRig(t)
	disk := filepath.Join(r.base, "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, size))
	run(t, "mkfs.ext4", "-q", "-F", "-m", "0", disk)
	run(t, "mount", "-o", "loop", disk, r.dir)
	r.atEnd = func() {
		if out, err := exec.Command("umount", r.dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}
	initPool(t, r.dir)
	r.startEngine()
	r.startPlugin(o)
	return r
}

func TestFullPool(t *testing.T) {
	r := newSmallRig(t, 192*mib, Options{Overcommit: 100})
	ctx := t.Context()
	keep := r.create("keep", 32*mib, blockCapability(writer))
	run(t, "dd", "if=/dev/urandom", "of="+keep.publish("vm"), "bs=1M", "count=8", "oflag=direct", "conv=notrunc", "status=none")
	want := run(t, "sha256sum", "-b", keep.target("vm"))
	keep.unstage("vm")
	old := r.create("old", 32*mib, blockCapability(writer))
	run(t, "dd", "if=/dev/urandom", "of="+old.publish("vm"), "bs=1M", "count=16", "oflag=direct", "conv=notrunc", "status=none")
	old.unstage("vm")
	oldSnapshot := old.snapshot("old")
	big := r.create("big", gib, blockCapability(writer))
	filler := filepath.Join(r.dir, "filler")
	run(t, "fallocate", "-l", "64M", filler)

	path := big.publish("vm")
	out, err := exec.Command("dd", "if=/dev/urandom", "of="+path, "bs=1M", "oflag=direct", "conv=notrunc", "status=none").CombinedOutput()
	if err == nil {
		t.Fatal("the pool took more than it has")
	}
	t.Logf("writing to a full pool: %s", out)
	fillUp(t, r.dir)
	req := r.createRequest("more", mib, blockCapability(writer))
	wantCode(t, codes.ResourceExhausted)(r.CreateVolume(ctx, req))
	if left := ok[*csi.GetCapacityResponse](t)(r.GetCapacity(ctx, &csi.GetCapacityRequest{})); left.GetAvailableCapacity() >= mib {
		t.Errorf("a full pool offers %d bytes", left.GetAvailableCapacity())
	}
	req = r.createRequest("copy", 0, blockCapability(writer))
	req.VolumeContentSource = contentSourceMessage("volume:" + keep.id)
	wantCode(t, codes.ResourceExhausted)(r.CreateVolume(ctx, req))
	wantCode(t, codes.ResourceExhausted)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "detached", SourceVolumeId: keep.id}))
	wantCode(t, codes.ResourceExhausted)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "attached", SourceVolumeId: big.id}))
	wantCode(t, codes.ResourceExhausted)(r.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: big.id, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * gib},
	}))

	// A volume that only has its snapshot left goes without needing space.
	if _, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: old.id}); codeOfCall(err) != codes.ResourceExhausted.String() {
		must(t, err)
	}
	r.deleteSnapshots(oldSnapshot)
	old.delete()
	run(t, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=4", "seek=300", "oflag=direct", "conv=notrunc", "status=none")

	must(t, os.Remove(filler))
	must(t, os.Remove(filepath.Join(r.dir, "last")))
	run(t, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=4", "seek=200", "oflag=direct", "conv=notrunc", "status=none")
	snaps := []string{big.snapshot("attached"), keep.snapshot("detached")}
	big.unstage("vm")
	big.delete()
	r.deleteSnapshots(snaps[0])
	if got := run(t, "sha256sum", "-b", keep.publish("vm")); got != want {
		t.Error("another volume was damaged")
	}
	keep.unstage("vm")
}

// fillUp takes the last block of a file system.
func fillUp(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "last"))
	must(t, err)
	defer f.Close()
	for block := make([]byte, mib); len(block) >= 512; {
		if _, err := f.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	must(t, f.Sync())
}

// TestPromises: without overcommit the pool promises no more than it has, also to calls that come at once.
func TestPromises(t *testing.T) {
	r := newSmallRig(t, 192*mib, Options{Reserve: 32 * mib})
	ctx := t.Context()
	capacity := func() int64 {
		return ok[*csi.GetCapacityResponse](t)(r.GetCapacity(ctx, &csi.GetCapacityRequest{})).GetAvailableCapacity()
	}
	at := capacity()
	if at < 100*mib || at > 160*mib {
		t.Fatalf("capacity %d", at)
	}
	wantCode(t, codes.ResourceExhausted)(r.CreateVolume(ctx, r.createRequest("all", at+mib, blockCapability(writer))))
	done := make(chan *csi.Volume, 8)
	for i := range cap(done) {
		go func() {
			resp, err := r.CreateVolume(ctx, r.createRequest(fmt.Sprint("v", i), 40*mib, blockCapability(writer)))
			if err != nil && codeOfCall(err) != codes.ResourceExhausted.String() {
				t.Error(err)
			}
			done <- resp.GetVolume()
		}()
	}
	var made []*testVolume
	for range cap(done) {
		if v := <-done; v != nil {
			made = append(made, &testVolume{rig: r, id: v.GetVolumeId()})
		}
	}
	if want := int(at / (40 * mib)); len(made) != want {
		t.Errorf("%d volumes of 40 MiB in %d bytes, want %d", len(made), at, want)
	}
	if left := capacity(); left >= 40*mib {
		t.Errorf("%d bytes are left", left)
	}
	_, err := r.CreateVolume(ctx, r.createRequest("more", 40*mib, blockCapability(writer)))
	said := status.Convert(err).Message()
	for _, want := range []string{
		"40 MiB do not fit in the pool of node " + testNode, " are free, of which 32 MiB are reserved",
		fmt.Sprintf(" are promised to %d volumes", len(made)), "overcommit is 1", "ConfigMap csi-qcow2",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("a full pool says %q, without %q", said, want)
		}
	}
	if bytes := regexp.MustCompile(`\d{7,}`).FindString(said); bytes != "" {
		t.Errorf("%q is not for people: %s", bytes, said)
	}
	for _, v := range made {
		v.delete()
	}
	if left := capacity(); left < at-mib {
		t.Errorf("%d of %d bytes are back", left, at)
	}
	r.wantEmpty()
}

// TestDeleteOnFullPool: on a pool that is full to its last byte a snapshot can be deleted, whether its volume is in use,
// is not, or has been deleted itself; then there is space again.
func TestDeleteOnFullPool(t *testing.T) {
	const data = 16 // MiB
	r := newSmallRig(t, 256*mib, Options{Overcommit: 100})
	write := func(path string, seek int) error {
		return exec.Command("dd", "if=/dev/urandom", "of="+path, "bs=1M", fmt.Sprint("count=", data), fmt.Sprint("seek=", seek),
			"oflag=direct", "conv=notrunc,fsync", "status=none").Run()
	}
	victim := func(name string) (v *testVolume, snapshot, path string) {
		v = r.create(name, 256*mib, blockCapability(writer))
		path = v.publish("vm")
		must(t, write(path, 0))
		snapshot = v.snapshot(name)
		must(t, write(path, 0))
		return v, snapshot, path
	}
	attached, attachedSnapshot, path := victim("attached")
	detached, detachedSnapshot, _ := victim("detached")
	detached.unstage("vm")
	deleted, deletedSnapshot, _ := victim("deleted")
	deleted.unstage("vm")

	last := filepath.Join(r.dir, "last")
	full := func() {
		t.Helper()
		_ = os.Remove(last)
		fillUp(t, r.dir)
		if err := write(path, 100); err == nil {
			t.Fatal("a full pool has space")
		}
		fillUp(t, r.dir) // what the write gave back
	}
	free := func(what string) {
		t.Helper()
		if left := freeBytes(t, r.dir); left < data/2*mib {
			t.Errorf("after the deletion of %s %d bytes are free", what, left)
		}
	}
	full()
	r.deleteSnapshots(detachedSnapshot)
	free("a detached volume's snapshot")
	full()
	r.deleteSnapshots(attachedSnapshot)
	free("an attached volume's snapshot")
	must(t, write(path, 200))
	full()
	deleted.delete()
	free("a volume with a snapshot")
	full()
	r.deleteSnapshots(deletedSnapshot)
	free("a deleted volume's last snapshot")
	must(t, write(path, 100))
	attached.unstage("vm")
	attached.delete()
	detached.delete()
}

func freeBytes(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	return int64(st.Bavail) * st.Frsize
}

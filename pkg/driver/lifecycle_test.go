package driver

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// TestFileSystemLife plays what a user's objects cause: write, snapshot while writing, restore, compare, expand, delete
// the source, restore from what it left, clean up.
func TestFileSystemLife(t *testing.T) {
	for _, fsType := range []string{fsExt4, fsXFS} {
		t.Run(fsType, func(t *testing.T) {
			r := newRig(t)
			source := r.create("pvc-source", 512*mib, mountCapability(fsType))
			path := source.publish("pod")
			before := filepath.Join(path, "before")
			writeTree(t, before, "before", 60)

			stopWriting := writeForever(t, filepath.Join(path, "meanwhile"))
			snap := source.snapshot("snap-1")
			if again := source.snapshot("snap-1"); again != snap {
				t.Errorf("the repeated call made %s", again)
			}
			stopWriting()
			want := digest(t, before)
			must(t, os.RemoveAll(before))

			restored := r.restore("pvc-restored", snap, 768*mib, mountCapability(fsType))
			other := restored.publish("pod") // beside its source
			if got := digest(t, filepath.Join(other, "before")); got != want {
				t.Errorf("the restored tree differs")
			}
			if size := fileSystemSize(t, other); size < 600*mib {
				t.Errorf("the restored file system has %d bytes", size)
			}
			expandMounted(t, restored, other, fsType)

			source.unstage("pod")
			source.delete()
			source.delete()
			if ids := r.volumeIDs(); !slices.Equal(ids, []string{restored.id}) {
				t.Errorf("listed volumes: %v", ids)
			}
			if ids := r.snapshotIDs(); !slices.Equal(ids, []string{snap}) {
				t.Errorf("listed snapshots: %v", ids)
			}
			again := r.restore("pvc-source", snap, 0, mountCapability(fsType)) // the name can be used again
			if got := digest(t, filepath.Join(again.publish("pod"), "before")); got != want {
				t.Errorf("the tree restored from the tombstone differs")
			}
			r.deleteSnapshots(snap, snap)
			again.unstage("pod")
			restored.unstage("pod")
			again.delete()
			restored.delete()
			r.wantEmpty()
		})
	}
}

// expandMounted expands a volume that a pod uses. ext4 needs a privilege that not every root has.
func expandMounted(t *testing.T, v *testVolume, path, fsType string) {
	t.Helper()
	may, err := mayGrowMountedExt()
	must(t, err)
	if isExt(fsType) && !may {
		wantCode(t, codes.FailedPrecondition)(v.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: gib},
		}))
		v.unstage("pod")
		v.publish("pod")
	} else if got := v.expand(path, gib); got != gib {
		t.Errorf("expanded to %d bytes", got)
	}
	if size := fileSystemSize(t, path); size < 900*mib {
		t.Errorf("the expanded file system has %d bytes", size)
	}
	if got := v.expand(path, mib); got != gib {
		t.Errorf("a smaller size made it %d bytes", got)
	}
	wantCode(t, codes.OutOfRange)(v.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: mib, LimitBytes: 2 * mib},
	}))
	get := ok[*csi.ControllerGetVolumeResponse](t)(v.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.id}))
	if got := get.GetVolume().GetCapacityBytes(); got != gib {
		t.Errorf("ControllerGetVolume says %d bytes", got)
	}
}

// writeForever rewrites a file until the returned function is called.
func writeForever(t *testing.T, path string) (stop func()) {
	t.Helper()
	end, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		block := make([]byte, 64<<10)
		for n := 0; ; n++ {
			select {
			case <-end:
				ended <- nil
				return
			default:
			}
			block[0] = byte(n)
			if err := os.WriteFile(path, slices.Repeat(block, 1+n%20), 0o644); err != nil {
				ended <- err
				return
			}
		}
	}()
	return func() {
		t.Helper()
		close(end)
		must(t, <-ended)
	}
}

func TestBlockLife(t *testing.T) {
	r := newRig(t)
	c := blockCapability(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)
	source := r.create("disk", 64*mib, c)
	path := source.publish("vm")
	if out := run(t, "blockdev", "--getsize64", path); out != "67108864\n" {
		t.Errorf("size: %s", out)
	}
	run(t, "dd", "if=/dev/urandom", "of="+path, "bs=1M", "count=16", "seek=3", "oflag=direct", "status=none")
	want := run(t, "sha256sum", "-b", path)
	snap := source.snapshot("snap")
	run(t, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=16", "seek=3", "oflag=direct", "status=none")

	clone := r.createRequest("clone", 64*mib, c)
	clone.VolumeContentSource = contentSourceMessage("volume:" + source.id) // of the present content
	cloned := r.createFrom(clone)
	if got := run(t, "sha256sum", "-b", cloned.publish("vm")); got[:64] == want[:64] {
		t.Error("the clone has the snapshot's content")
	}
	cloned.unstage("vm")

	restored := r.restore("restored", snap, 64*mib, c)
	if got := run(t, "sha256sum", "-b", restored.publish("vm")); got[:64] != want[:64] {
		t.Error("the restored disk differs")
	}
	if got := restored.expand(restored.target("vm"), 96*mib); got != 96*mib {
		t.Errorf("expanded to %d", got)
	}
	if out := run(t, "blockdev", "--getsize64", restored.target("vm")); out != "100663296\n" {
		t.Errorf("expanded size: %s", out)
	}
	stats := ok[*csi.NodeGetVolumeStatsResponse](t)(r.NodeGetVolumeStats(t.Context(),
		&csi.NodeGetVolumeStatsRequest{VolumeId: restored.id, VolumePath: restored.target("vm")}))
	if u := stats.GetUsage(); len(u) != 1 || u[0].GetTotal() != 96*mib || u[0].GetUnit() != csi.VolumeUsage_BYTES {
		t.Errorf("stats: %v", u)
	}
	restored.unstage("vm")
	source.unstage("vm")
	for _, v := range []*testVolume{source, restored, cloned} {
		v.delete()
	}
	r.deleteSnapshots(snap)
	r.wantEmpty()
}

func TestReadOnlyPublish(t *testing.T) {
	r := newRig(t)
	v := r.create("fs", 64*mib, mountCapability(fsExt4))
	rw := v.publish("writer")
	must(t, os.WriteFile(filepath.Join(rw, "file"), []byte("x"), 0o644))
	ro := v.publishRequest("reader")
	ro.Readonly = true
	for range 2 {
		ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), ro))
	}
	if err := os.WriteFile(filepath.Join(v.target("reader"), "other"), nil, 0o644); err == nil {
		t.Error("a read-only mount was written")
	}
	must(t, os.WriteFile(filepath.Join(rw, "other"), nil, 0o644))
	wantCode(t, codes.AlreadyExists)(r.NodePublishVolume(t.Context(), v.publishRequest("reader")))
	wantCode(t, codes.FailedPrecondition)(r.NodeUnstageVolume(t.Context(),
		&csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.stagingPath()}))
	must(t, os.WriteFile(filepath.Join(rw, "still-there"), nil, 0o644))
	ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), v.publishRequest("third"))) // it is staged
	v.unstage("reader", "writer", "third")

	disk := r.create("disk", 16*mib, blockCapability(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER))
	disk.stage()
	ro = disk.publishRequest("reader")
	ro.Readonly = true
	ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), ro))
	wantReadOnly(t, disk.target("reader"))
	rw = disk.publish("writer")
	run(t, "dd", "if=/dev/zero", "of="+rw, "bs=4k", "count=1", "oflag=direct", "conv=notrunc", "status=none")
	disk.unpublish("writer")
	wantReadOnly(t, disk.target("reader"))
	disk.unstage("reader")
	disk.delete()
	v.delete()
	r.wantEmpty()
}

// wantReadOnly checks that a device cannot be written.
func wantReadOnly(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), 0); err == nil {
		t.Errorf("%s can be written", path)
	}
}

func TestReaderOnlyMode(t *testing.T) {
	r := newRig(t)
	v := r.create("fs", 64*mib, mountCapability(fsExt4))
	must(t, os.WriteFile(filepath.Join(v.publish("pod"), "file"), []byte("x"), 0o644))
	v.unstage("pod")
	v.capability = mountCapability(fsExt4)
	v.capability.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	path := v.publish("pod")
	if err := unix.Access(filepath.Join(path, "file"), unix.W_OK); err == nil {
		t.Error("the volume can be written")
	}
	wantCode(t, codes.FailedPrecondition)(r.NodePublishVolume(t.Context(), v.publishRequest("other")))
	v.unstage("pod")
	v.delete()
}

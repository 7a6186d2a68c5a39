package driver

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// imagePath is where a volume's image lies.
func (v *testVolume) imagePath() string {
	return filepath.Join(v.dir, "volumes", v.id, "image.qcow2")
}

// refused checks that a volume is not staged, says why, and keeps its content.
func (v *testVolume) refused(code codes.Code, why string) {
	v.t.Helper()
	before, err := os.ReadFile(v.imagePath())
	must(v.t, err)
	_, err = v.NodeStageVolume(v.t.Context(), v.stageRequest())
	if status.Code(err) != code || !strings.Contains(err.Error(), why) {
		v.t.Errorf("got %v, want %v with %q", err, code, why)
	}
	if list, err := v.client.List(v.t.Context()); err != nil || len(list) > 0 {
		v.t.Errorf("attached: %v, %v", list, err)
	}
	after, err := os.ReadFile(v.imagePath())
	must(v.t, err)
	// What QEMU calls autoclear features, and the like, may change in the header; nothing else.
	if sha256.Sum256(before[min(4096, len(before)):]) != sha256.Sum256(after[min(4096, len(after)):]) {
		v.t.Error("the image was changed")
	}
}

// TestNotFormatted: what holds, or held, data is never formatted, though nothing is recognised on it.
func TestNotFormatted(t *testing.T) {
	r := newRig(t)
	asFS := func(v *testVolume) *testVolume { v.capability = mountCapability(fsExt4); return v }
	free := func(name string) *testVolume { // a volume that may be used either way
		req := r.createRequest(name, 32*mib, blockCapability(writer))
		req.VolumeCapabilities = append(req.VolumeCapabilities, mountCapability(fsExt4))
		return r.createFrom(req)
	}
	for name, write := range map[string]struct{ script, why string }{
		"raw":       {`dd if=/dev/urandom of="$1" bs=1M count=32 oflag=direct status=none`, "no file system is recognised"},
		"far":       {`dd if=/dev/urandom of="$1" bs=1M count=1 seek=20 oflag=direct status=none`, "no file system is recognised"},
		"zeros":     {`dd if=/dev/zero of="$1" bs=1M count=1 seek=20 oflag=direct status=none`, "no file system is recognised"},
		"discarded": {`dd if=/dev/urandom of="$1" bs=1M count=1 oflag=direct status=none; blkdiscard "$1"`, "held, data"},
		"swap":      {`mkswap -q "$1"`, "holds swap"},
		"partitions": {`printf '\200\1\1\0\203\1\1\0\1\0\0\0\0\10\0\0%048d\125\252' 0 | tr 0 '\0' |
			dd of="$1" bs=1 seek=446 conv=notrunc status=none`, "a partition table (dos)"},
		"luks": {`{ printf 'LUKS\272\276\0\1aes'; head -c 1M /dev/zero; } | dd of="$1" bs=1M conv=notrunc status=none`, "holds crypto_LUKS"},
		"two": {
			`mke2fs -q -F "$1" && truncate -s 400M xfs && mkfs.xfs -q xfs && dd if=xfs of="$1" bs=512 count=1 conv=notrunc status=none`,
			"several things",
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := free(name)
			run(t, "bash", "-c", `cd "$2";`+write.script, "write", v.publish("vm"), t.TempDir())
			snap := v.snapshot("snap")
			v.unstage("vm")
			asFS(v).refused(codes.FailedPrecondition, write.why)
			restored := r.restore("restored-"+name, snap, 0, mountCapability(fsExt4))
			restored.refused(codes.FailedPrecondition, "")
			restored.delete()
			v.delete()
			r.deleteSnapshots(snap)
		})
	}
	r.wantEmpty()
}

// TestDamagedNotFormatted: a volume that cannot be read is not taken for an empty one.
func TestDamagedNotFormatted(t *testing.T) {
	r := newRig(t)
	source := r.create("source", 16*mib, mountCapability(fsExt4))
	must(t, os.WriteFile(filepath.Join(source.publish("pod"), "file"), bytes.Repeat([]byte("precious"), 1000), 0o644))
	source.unstage("pod")
	raw := filepath.Join(t.TempDir(), "raw")
	run(t, "qemu-img", "convert", "-O", "raw", source.imagePath(), raw)

	rotten := r.create("rotten", 16*mib, mountCapability(fsExt4))
	must(t, os.Remove(rotten.imagePath()))
	run(t, "qemu-img", "convert", "-c", "-O", "qcow2", raw, rotten.imagePath())
	good, err := os.ReadFile(rotten.imagePath())
	must(t, err)
	bad := bytes.Clone(good)
	be := binary.BigEndian
	l2 := be.Uint64(good[be.Uint64(good[40:]):]) & 0x00fffffffffffe00
	entry := be.Uint64(good[l2:])
	if entry>>62 != 1 {
		t.Fatalf("the first cluster is not compressed: %#x", entry)
	}
	bad[entry&(1<<54-1)] |= 6 // a kind of block that deflate does not know: other bytes may decompress to something
	must(t, os.WriteFile(rotten.imagePath(), bad, 0o600))
	rotten.refused(codes.DataLoss, "input/output error")
	must(t, os.WriteFile(rotten.imagePath(), good, 0o600))
	rotten.unstage("none")

	for _, size := range []int64{3 << 16, 5 << 16, 6 << 16} {
		cut := r.create("cut", 16*mib, mountCapability(fsExt4))
		whole, err := os.ReadFile(source.imagePath())
		must(t, err)
		must(t, os.WriteFile(cut.imagePath(), whole, 0o600))
		must(t, os.Truncate(cut.imagePath(), size))
		if _, err := r.NodeStageVolume(t.Context(), cut.stageRequest()); err == nil {
			t.Errorf("cut to %d bytes: staged", size)
		}
		must(t, os.WriteFile(cut.imagePath(), whole, 0o600))
		cut.delete()
	}
	must(t, unix.Access(source.imagePath(), unix.R_OK))
	rotten.delete()
	source.delete()
	r.wantEmpty()
}

// TestFormatted: what is known to be empty is formatted, however it came to be, and once.
func TestFormatted(t *testing.T) {
	r := newRig(t)
	p, err := pool.Open(r.dir)
	must(t, err)
	usable := func(v *testVolume) {
		t.Helper()
		file := filepath.Join(v.publish("pod"), "file")
		must(t, os.WriteFile(file, []byte("precious"), 0o644))
		if _, set, err := p.Marked(v.id, pool.Unformatted); err != nil || set {
			t.Errorf("marked as unformatted: %v, %v", set, err)
		}
		v.unstage("pod")
		v.publish("pod")
		if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
			t.Errorf("%q, %v", got, err)
		}
		v.unstage("pod")
	}
	empty := r.create("empty", 16*mib, mountCapability(fsExt4))
	snap := empty.snapshot("snap")
	restored := r.restore("restored", snap, 32*mib, mountCapability(fsExt4))
	usable(empty) // though it has a snapshot
	usable(restored)
	late := r.restore("late", snap, 0, mountCapability(fsExt4))
	late.refused(codes.FailedPrecondition, "is a copy of")

	for _, mode := range []string{"metadata", "falloc", "full"} {
		req := r.createRequest("preallocated-"+mode, 16*mib, mountCapability(fsExt4))
		req.Parameters = map[string]string{paramPreallocation: mode}
		v := r.createFrom(req)
		usable(v)
		v.delete()
		block := r.createRequest("given-"+mode, 16*mib, blockCapability(writer))
		block.Parameters = req.Parameters
		block.VolumeCapabilities = append(block.VolumeCapabilities, mountCapability(fsExt4))
		v = r.createFrom(block)
		run(t, "dd", "if=/dev/urandom", "of="+v.publish("vm"), "bs=1M", "count=1", "oflag=direct", "status=none")
		v.unstage("vm")
		v.capability = mountCapability(fsExt4)
		v.refused(codes.FailedPrecondition, "no file system")
		v.delete()
	}

	// A first format that was interrupted: after its record, and after half of what it writes.
	for _, script := range []string{"true", `mkfs.ext4 -q -F "$1" && dd if=/dev/urandom of="$1" bs=1M count=4 seek=1 conv=notrunc status=none`} {
		half := r.create("half", 16*mib, mountCapability(fsExt4))
		must(t, p.Mark(half.id, pool.Unformatted, []byte(fsExt4)))
		device := ok[engine.Device](t)(r.client.Attach(t.Context(), half.id)).Path
		run(t, "bash", "-c", script, "write", device)
		eventually(t, "it is detached", func() bool { return r.client.Detach(t.Context(), half.id) == nil })
		usable(half)
		half.delete()
	}
	for _, v := range []*testVolume{empty, restored, late} {
		v.delete()
	}
	r.deleteSnapshots(snap)
	r.wantEmpty()
}

// TestReaderOnlyBlank: a volume that may only be read is not formatted.
func TestReaderOnlyBlank(t *testing.T) {
	r := newRig(t)
	v := r.create("fs", 16*mib, mountCapability(fsExt4))
	v.capability = mountCapability(fsExt4)
	v.capability.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	v.refused(codes.FailedPrecondition, "blank")
	v.delete()
}

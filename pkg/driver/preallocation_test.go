package driver

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestPreallocation makes volumes of StorageClasses with each kind of preallocation: what they occupy at once, and that a
// pod's writes to one without snapshots occupy no more.
func TestPreallocation(t *testing.T) {
	r := newRig(t)
	const size = 32 * mib
	for name, least := range map[string]int64{"off": 0, "metadata": 0, "falloc": size, "full": size} {
		req := r.createRequest("pvc-"+name, size, blockCapability(writer))
		req.Parameters = map[string]string{paramPreallocation: name}
		v := r.createFrom(req)
		path := filepath.Join(r.dir, "volumes", v.id, "image.qcow2")
		if blocks := occupied(t, path); blocks < least || blocks > least+2*mib {
			t.Errorf("%s: an empty volume of %d bytes occupies %d", name, size, blocks)
		}
		before := occupied(t, path)
		device := v.publish("pod")
		run(t, "dd", "if=/dev/urandom", "of="+device, "bs=1M", "count=8", "oflag=direct", "conv=notrunc", "status=none")
		v.unstage("pod")
		if grown := occupied(t, path) - before; least > 0 && grown > mib || least == 0 && grown < 8*mib {
			t.Errorf("%s: 8 MiB that a pod wrote made it occupy %d bytes more", name, grown)
		}
		// The same request again, and one that differs in this alone.
		if again := r.createFrom(req); again.id != v.id {
			t.Errorf("%s: asked for twice it is another volume", name)
		}
		req.Parameters = map[string]string{paramPreallocation: map[bool]string{true: "off", false: "full"}[name == "full"]}
		wantCode(t, codes.AlreadyExists)(r.CreateVolume(t.Context(), req))
	}
}

// occupied returns the bytes that a file takes up on disk.
func occupied(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

package driver

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

func TestSnapshotID(t *testing.T) {
	const volume = "pvc-1-0a1b2c3d-4e5f6a7b"
	long := strings.Repeat("s", maxIDLength-len(volume)-1)
	for _, c := range []struct {
		name, snapshot string
		hashed         bool
	}{
		{"usual", "snapshot-5a0b", false},
		{"with the separator", "a@b", false},
		{"longest that is kept", long, false},
		{"one byte more", long + "s", true},
		{"like a hash", "~0123", true},
		{"not text", "\xff\xfe", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := snapshotID(volume, c.snapshot)
			if got := strings.HasPrefix(id, volume+"@~"); got != c.hashed {
				t.Errorf("%q: hashed %v, want %v", id, got, c.hashed)
			}
			if !c.hashed && id != volume+"@"+c.snapshot {
				t.Errorf("got %q", id)
			}
			if len(id) > maxIDLength {
				t.Errorf("%d bytes", len(id))
			}
			if got, ok := snapshotVolume(id); !ok || got != volume {
				t.Errorf("its volume is %q, %v", got, ok)
			}
		})
	}
	if snapshotID(volume, long+"a") == snapshotID(volume, long+"b") {
		t.Error("two names have one ID")
	}
}

func TestSnapshotVolumeOfForeignIDs(t *testing.T) {
	for _, id := range []string{
		"", "@", "none-exist-id", "../../etc/passwd@x", "a/b-0a1b2c3d-4e5f6a7b@x", "@x", "pvc@x", "pvc-1-0a1b2c3d-4e5f6a7b",
	} {
		if volume, ok := snapshotVolume(id); ok {
			t.Errorf("%q is taken for a snapshot of %q", id, volume)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, c := range []struct {
		name string
		code codes.Code
	}{
		{"snapshot-1", codes.OK},
		{"über straße\t/..", codes.OK},
		{strings.Repeat("x", maxNameLength), codes.OK},
		{"", codes.InvalidArgument},
		{strings.Repeat("x", maxNameLength+1), codes.InvalidArgument},
		{"a\x00b", codes.InvalidArgument},
		{"a\x1bb", codes.InvalidArgument},
		{"a\u0085b", codes.InvalidArgument},
		{"a\xffb", codes.InvalidArgument},
		{".csi-qcow2-clone.1", codes.InvalidArgument},
	} {
		if err := checkSnapshotName(c.name); codeOrOK(err) != c.code {
			t.Errorf("%q: %v, want %v", c.name, err, c.code)
		}
	}
}

func codeOrOK(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	return codeOf(err)
}

func TestTopologySegment(t *testing.T) {
	for _, name := range []string{"node-a", "ip-10-0-0-1.eu-west-1.compute.internal", strings.Repeat("n", 63)} {
		if got := topologySegment(name); got != name {
			t.Errorf("%q became %q", name, got)
		}
	}
	long := strings.Repeat("n", 64)
	for _, name := range []string{long, "a b", "-a", "ü"} {
		if got := topologySegment(name); got == name || len(got) > 63 || got != topologySegment(got) {
			t.Errorf("%q became %q", name, got)
		}
	}
	if topologySegment(long) == topologySegment(long+"n") {
		t.Error("two nodes have one segment")
	}
}

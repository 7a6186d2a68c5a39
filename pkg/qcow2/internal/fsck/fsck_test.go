package fsck

import (
	"encoding/binary"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// newImage returns an image of QEMU's with data and a snapshot, and where the count of its last data cluster is.
func newImage(t *testing.T) (f host.File, count int64) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	for _, args := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", path, "16M"},
		{"qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path},
		{"qemu-img", "snapshot", "-c", "first", path},
		{"qemu-io", "-f", "qcow2", "-c", "write -P 2 64K 64K", path},
	} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	f, err := host.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // it was read
	h, err := format.ReadHeader(f, format.DecodeHeader)
	if err != nil {
		t.Fatal(err)
	}
	g := h.Geometry()
	at := func(off format.HostOffset) format.HostOffset {
		var b [8]byte
		if err := format.ReadPadded(f, b[:], off); err != nil {
			t.Fatal(err)
		}
		return format.HostOffset(binary.BigEndian.Uint64(b[:]) & format.OffsetMask)
	}
	data := at(at(h.L1Offset).Plus(8 * g.L2Index(64<<10))) // the active disk alone has it
	return f, int64(at(h.RefTableOffset)) + g.InBlock(g.Cluster(data))*2
}

func setCount(t *testing.T, f host.File, at int64, n uint16) {
	t.Helper()
	if _, err := f.WriteAt(binary.BigEndian.AppendUint16(nil, n), at); err != nil {
		t.Fatal(err)
	}
}

func mustCheck(t *testing.T, f host.File, corruptions, leaks int64) CheckResult {
	t.Helper()
	r, err := Check(t.Context(), f, nil)
	if err != nil || r.Errors != 0 || r.Corruptions != corruptions || r.Leaks != leaks {
		t.Fatalf("%+v, %v; want %d corruptions and %d leaks", r, err, corruptions, leaks)
	}
	return r
}

// TestCheckAndRepair: a count that is too low is corruption, one that is too high a leak, and a repair mends both.
func TestCheckAndRepair(t *testing.T) {
	for name, c := range map[string]struct {
		count              uint16
		corruptions, leaks int64
		says               string
		kind               RepairKind
	}{
		"too low":                  {0, 2, 0, "refcount 0, references 1", RepairAll}, // and COPIED is wrong
		"too high":                 {2, 1, 1, "refcount 2, references 1", RepairAll},
		"too low, for leaks only":  {0, 2, 0, "refcount 0, references 1", RepairLeaks},
		"sound, and nothing to do": {1, 0, 0, "", RepairAll},
	} {
		t.Run(name, func(t *testing.T) {
			f, count := newImage(t)
			mustCheck(t, f, 0, 0)
			setCount(t, f, count, c.count)
			found := mustCheck(t, f, c.corruptions, c.leaks)
			if !strings.Contains(strings.Join(found.Problems, "\n"), c.says) {
				t.Errorf("%q is not in %q", c.says, found.Problems)
			}
			r, err := Repair(t.Context(), f, c.kind, nil)
			if err != nil || r.Found.Corruptions != c.corruptions || r.Lost != 0 {
				t.Fatalf("%+v, %v", r, err)
			}
			if c.kind == RepairLeaks {
				mustCheck(t, f, c.corruptions, c.leaks) // it is not for that
				return
			}
			mustCheck(t, f, 0, 0)
		})
	}
}

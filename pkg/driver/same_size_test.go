package driver

import (
	"fmt"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// TestSameRequestAgain: what was asked for a volume is enough for its restore and its clone, whatever the volume got. The
// provisioner refuses a restore whose claim asks for less than the snapshot's SizeBytes.
func TestSameRequestAgain(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	for _, c := range []struct {
		asked      int64
		capability *csi.VolumeCapability
		got        int64
	}{
		{1_000_000_000, mountCapability("ext4"), 1_000_001_536},
		{5_000_000_000, blockCapability(writer), 5_000_003_584},
		{134_217_729, mountCapability("ext4"), 128*mib + 4096},
		{gib, blockCapability(writer), gib},
		{1, blockCapability(writer), mib},
		{100 * mib, mountCapability("xfs"), 300 * mib},
	} {
		name := fmt.Sprint("pvc-", c.asked)
		req := r.createRequest(name, c.asked, c.capability)
		v := r.createFrom(req)
		if v.size != c.got {
			t.Errorf("asked for %d bytes: got %d, want %d", c.asked, v.size, c.got)
		}
		v.snapshot("of-" + name)
		restored := r.createRequest(name+"-restored", r.restoreSize(v, "of-"+name), c.capability)
		if got := restored.GetCapacityRange().GetRequiredBytes(); got != c.asked {
			t.Errorf("asked for %d bytes: a restore must ask for %d", c.asked, got)
		}
		restored.CapacityRange = req.GetCapacityRange()
		restored.VolumeContentSource = contentSourceMessage("snapshot:" + snapshotID(v.id, "of-"+name))
		cloned := r.createRequest(name+"-cloned", c.asked, c.capability)
		cloned.VolumeContentSource = contentSourceMessage("volume:" + v.id)
		for _, req := range []*csi.CreateVolumeRequest{restored, cloned} {
			again := r.createFrom(req)
			if repeated := r.createFrom(req); repeated.id != again.id || again.size != c.got {
				t.Errorf("%s: %d bytes as %s, then %s; want %d", req.GetName(), again.size, again.id, repeated.id, c.got)
			}
			again.snapshot("of-" + req.GetName()) // and so on
			if got := r.restoreSize(again, "of-"+req.GetName()); got != c.asked {
				t.Errorf("a restore of %s must ask for %d bytes, want %d", req.GetName(), got, c.asked)
			}
		}
		restored.Name, restored.CapacityRange = name+"-less", &csi.CapacityRange{RequiredBytes: c.asked - 4096}
		if c.asked > 4096 {
			wantCode(t, codes.OutOfRange)(r.CreateVolume(ctx, restored))
		}
	}
}

// TestSameRequestAfterExpansion: each snapshot needs what was asked when the volume had its size.
func TestSameRequestAfterExpansion(t *testing.T) {
	r := newRig(t)
	v := r.create("v", 10_000_000, blockCapability(writer))
	v.snapshot("small")
	path := v.publish("vm")
	for range 2 { // kubelet repeats it
		if got := v.expand(path, 20_000_000); got != roundUp(20_000_000) {
			t.Errorf("expanded to %d bytes", got)
		}
	}
	v.snapshot("large")
	v.unstage("vm")
	for name, want := range map[string]int64{"small": 10_000_000, "large": 20_000_000} {
		if got := r.restoreSize(v, name); got != want {
			t.Errorf("a restore of %s must ask for %d bytes, want %d", name, got, want)
		}
		r.restore("from-"+name, snapshotID(v.id, name), want, blockCapability(writer))
	}
}

// restoreSize is what a claim that restores a volume's snapshot must ask for.
func (r *rig) restoreSize(v *testVolume, name string) int64 {
	r.t.Helper()
	created := ok[*csi.CreateSnapshotResponse](r.t)(r.CreateSnapshot(r.t.Context(),
		&csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})).GetSnapshot()
	listed := ok[*csi.GetSnapshotResponse](r.t)(r.GetSnapshot(r.t.Context(),
		&csi.GetSnapshotRequest{SnapshotId: created.GetSnapshotId()})).GetSnapshot()
	if created.GetSizeBytes() != listed.GetSizeBytes() {
		r.t.Errorf("snapshot %s: created with %d bytes, listed with %d", name, created.GetSizeBytes(), listed.GetSizeBytes())
	}
	return created.GetSizeBytes()
}

package driver

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A tenant who overwrites his volume between snapshots is refused a snapshot before he takes what others were promised.
func TestTenantCannotFillThePool(t *testing.T) {
	const size = 32 // MiB
	for name, c := range map[string]struct {
		limit, says string
		snapshots   int
	}{
		"the pool's space":   {"100000%", "the pool of node " + testNode + " lacks", 4},
		"the volume's limit": {"", "snapshotLimit 200%", 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newSmallRig(t, 320*mib, Options{Reserve: 64 * mib})
			ctx := t.Context()
			write := func(path string) error {
				out, err := exec.Command("dd", "if=/dev/urandom", "of="+path, "bs=1M", fmt.Sprint("count=", size), "oflag=direct",
					"conv=notrunc,fsync", "status=none").CombinedOutput()
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			}
			neighbour := r.create("neighbour", size*mib, blockCapability(writer))
			req := r.createRequest("tenant", size*mib, blockCapability(writer))
			if c.limit != "" {
				req.Parameters = map[string]string{paramSnapshotLimit: c.limit}
			}
			tenant := r.createFrom(req)
			path := tenant.publish("vm")
			var snaps []string
			var refused error
			for i := range 12 {
				must(t, write(path)) // what was promised can be written
				name := fmt.Sprint("s", i)
				resp, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: tenant.id})
				if err != nil {
					refused = err
					break
				}
				snaps = append(snaps, resp.GetSnapshot().GetSnapshotId())
			}
			if status.Code(refused) != codes.ResourceExhausted || !strings.Contains(refused.Error(), c.says) {
				t.Fatalf("after %d snapshots: %v", len(snaps), refused)
			}
			t.Logf("after %d snapshots: %v", len(snaps), refused)
			if len(snaps) < c.snapshots-1 || len(snaps) > c.snapshots {
				t.Errorf("%d snapshots, want %d", len(snaps), c.snapshots)
			}
			// One that exists is not taken, and not refused.
			ok[*csi.CreateSnapshotResponse](t)(r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s0", SourceVolumeId: tenant.id}))
			must(t, write(path))
			if left := freeBytes(t, r.dir); left < (64+size)*mib {
				t.Errorf("%d bytes are free: the reserve, or what the neighbour was promised, is gone", left)
			}
			must(t, write(neighbour.publish("vm")))
			if c.limit == "" {
				r.deleteSnapshots(neighbour.snapshot("other"))
			}

			r.deleteSnapshots(snaps...)
			r.deleteSnapshots(tenant.snapshot("later"))
			for _, v := range []*testVolume{tenant, neighbour} {
				v.unstage("vm")
				v.delete()
			}
			r.wantEmpty()
		})
	}
}

func TestSnapshotLimitParameter(t *testing.T) {
	for value, want := range map[string]int64{"0%": 0, "50%": 50, "100000%": 100000} {
		p, err := parseVolumeParameters(map[string]string{paramSnapshotLimit: value})
		must(t, err)
		got, err := parsePercent(recordedParameters(p.record()).snapshotLimit)
		must(t, err)
		if got != want {
			t.Errorf("%s is %d", value, got)
		}
	}
	for _, value := range []string{"", "%", "50", "-1%", "1.5%", "50 %", "99999999999%", "none"} {
		if _, err := parseVolumeParameters(map[string]string{paramSnapshotLimit: value}); codeOf(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func TestMaxVolumesPerNode(t *testing.T) {
	r := newIdleRig(t)
	r.startEngine()
	r.startPlugin(Options{MaxVolumes: 17})
	if got := ok[*csi.NodeGetInfoResponse](t)(r.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})); got.GetMaxVolumesPerNode() != 17 {
		t.Errorf("%v", got)
	}
}

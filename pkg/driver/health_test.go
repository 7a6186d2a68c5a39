package driver

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// reasons returns what is wrong with a volume, in one word each. The node and the controller say the same.
func (r *rig) reasons(id string) []string {
	r.t.Helper()
	ctx := r.t.Context()
	node := ok[*csi.NodeGetVolumeHealthResponse](r.t)(r.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id}))
	got := reasonsOf(node.GetVolumeHealth().GetHealthStatuses())
	one := ok[*csi.ControllerGetVolumeHealthResponse](r.t)(
		r.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id}))
	all := ok[*csi.ControllerListVolumeHealthResponse](r.t)(
		r.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{}))
	listed := []string{}
	for _, v := range all.GetEntries() {
		if v.GetVolumeId() == id {
			listed = reasonsOf(v.GetHealthStatuses())
		}
	}
	if c := reasonsOf(one.GetVolumeHealth().GetHealthStatuses()); !slices.Equal(c, got) || !slices.Equal(c, listed) {
		return []string{"it changes"}
	}
	return got
}

func reasonsOf(conditions []*csi.VolumeHealth_VolumeHealthEntry) []string {
	out := []string{}
	for _, c := range conditions {
		out = append(out, c.GetReason())
	}
	return out
}

func (r *rig) workerPID(id string) (pid int) {
	r.t.Helper()
	eventually(r.t, "the volume has a worker", func() bool {
		list, err := r.client.List(r.t.Context())
		for _, a := range list {
			if a.VolumeID == id {
				pid = a.WorkerPID
			}
		}
		return err == nil && pid != 0
	})
	return pid
}

func (r *rig) awaitReasons(id string, want ...string) {
	r.t.Helper()
	var got []string
	defer func() {
		if r.t.Failed() {
			r.t.Logf("the last reasons: %q", got)
		}
	}()
	eventually(r.t, strings.Join(append(want, "is all that is wrong"), " "), func() bool {
		got = r.reasons(id)
		return slices.Equal(got, want)
	})
}

// What goes wrong with a volume is reported as long as it lasts, and its neighbour is well.
func TestVolumeHealth(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("disk", 64*mib, mountCapability(fsExt4))
	v.stage()
	neighbour := r.create("neighbour", 64*mib, blockCapability(writer))
	neighbour.stage()
	r.awaitReasons(v.id)

	// A worker that does not answer.
	pid := r.workerPID(v.id)
	must(t, unix.Kill(pid, unix.SIGSTOP))
	r.awaitReasons(v.id, "IOStalled")
	must(t, unix.Kill(pid, unix.SIGCONT))
	r.awaitReasons(v.id)

	// One that is dead, and no other can start: somebody else has the volume.
	lease := r.killForGood(v.id)
	r.awaitReasons(v.id, "WorkerReplaced")
	wantCode(t, codes.Unavailable)(r.NodePublishVolume(ctx, v.publishRequest("pod")))
	must(t, lease.Unlock())
	r.awaitReasons(v.id)
	if got := r.reasons(neighbour.id); len(got) != 0 {
		t.Errorf("the neighbour: %q", got)
	}

	// The image is gone.
	must(t, os.Rename(v.imagePath(), v.imagePath()+".away"))
	r.awaitReasons(v.id, "ImageMissing")
	page := ok[*csi.ControllerListVolumeHealthResponse](t)(
		r.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{MaxEntries: 1}))
	if n := len(page.GetEntries()); n != 1 || page.GetNextToken() != "" {
		t.Errorf("%d entries are listed, next %q", n, page.GetNextToken())
	}
	must(t, os.Rename(v.imagePath()+".away", v.imagePath()))

	for _, bad := range []struct {
		req  *csi.NodeGetVolumeHealthRequest
		code codes.Code
	}{
		{&csi.NodeGetVolumeHealthRequest{}, codes.InvalidArgument},
		{&csi.NodeGetVolumeHealthRequest{VolumeId: v.id, StagingTargetPath: "x"}, codes.InvalidArgument},
		{&csi.NodeGetVolumeHealthRequest{VolumeId: "x"}, codes.NotFound},
	} {
		wantCode(t, bad.code)(r.NodeGetVolumeHealth(ctx, bad.req))
	}
	wantCode(t, codes.NotFound)(r.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: "x"}))
	wantCode(t, codes.Aborted)(r.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{StartingToken: "x"}))
	v.unstage()
	v.delete()
	neighbour.unstage()
	neighbour.delete()
}

// Each state of an attachment is one condition.
func TestConditions(t *testing.T) {
	dir := t.TempDir()
	must(t, pool.Init(dir))
	p, err := pool.Open(dir)
	must(t, err)
	for _, c := range []struct {
		a    engine.Attachment
		want []csi.VolumeHealthErrorType
	}{
		{engine.Attachment{}, nil},
		{engine.Attachment{State: engine.Failed}, []csi.VolumeHealthErrorType{csi.VolumeHealthErrorType_INACCESSIBLE}},
		{engine.Attachment{State: engine.Replacing}, []csi.VolumeHealthErrorType{csi.VolumeHealthErrorType_DEGRADED}},
		{engine.Attachment{State: engine.Stalled}, []csi.VolumeHealthErrorType{csi.VolumeHealthErrorType_INACCESSIBLE}},
		{engine.Attachment{Corrupt: true}, []csi.VolumeHealthErrorType{csi.VolumeHealthErrorType_DATA_LOSS}},
		{
			engine.Attachment{State: engine.Failed, Corrupt: true},
			[]csi.VolumeHealthErrorType{csi.VolumeHealthErrorType_INACCESSIBLE, csi.VolumeHealthErrorType_DATA_LOSS},
		},
	} {
		want := append(c.want, csi.VolumeHealthErrorType_DATA_LOSS) // there is no image
		var got []csi.VolumeHealthErrorType
		for _, e := range conditionsOf(p, "v", c.a) {
			got = append(got, e.GetStatus())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%+v: %v, want %v", c.a, got, want)
		}
	}
}

func (r *rig) storageReason() string {
	r.t.Helper()
	resp := ok[*csi.NodeGetStorageHealthResponse](r.t)(r.NodeGetStorageHealth(r.t.Context(), &csi.NodeGetStorageHealthRequest{}))
	if len(resp.GetBackendHealth()) == 0 {
		return ""
	}
	return resp.GetBackendHealth()[0].GetReason()
}

// wantUnready: calls that need pool and engine cannot be answered now, for this reason. The plugin is alive nevertheless: the
// liveness probe of the CSI project, which takes "not ready" for dead, must not restart it.
func (r *rig) wantUnready(reason string) {
	r.t.Helper()
	if got := r.storageReason(); got != reason {
		r.t.Errorf("the storage's health is %q, want %s", got, reason)
	}
	if !ok[*csi.ProbeResponse](r.t)(r.Probe(r.t.Context(), &csi.ProbeRequest{})).GetReady().GetValue() {
		r.t.Errorf("%s: a liveness probe would restart the plugin", reason)
	}
}

func (r *rig) awaitReady() {
	r.t.Helper()
	eventually(r.t, "pool and engine are there", func() bool { return r.storageReason() == "" })
}

func TestStorageHealth(t *testing.T) {
	r := newIdleRig(t)
	r.startEngine()
	r.startPlugin(Options{Reserve: 1 << 50})
	r.wantUnready("PoolNotReady")
	must(t, pool.Init(r.dir))
	eventually(t, "all of the pool is reserved", func() bool { return r.storageReason() == "PoolFull" })
	r.stop()
	r.startPlugin(Options{})
	r.awaitReady()
	r.engine.terminate()
	r.wantUnready("EngineUnavailable")
}

// killForGood kills a volume's worker, and has the volume, so that no other can start.
func (r *rig) killForGood(id string) *pool.Lease {
	t := r.t
	t.Helper()
	worker := r.workerPID(id)
	must(t, r.engine.cmd.Process.Signal(unix.SIGSTOP))
	must(t, unix.Kill(worker, unix.SIGKILL))
	p, err := pool.Open(r.dir)
	must(t, err)
	var lease *pool.Lease
	eventually(t, "the worker is dead", func() bool {
		lease, err = p.Lock(id)
		return err == nil
	})
	must(t, r.engine.cmd.Process.Signal(unix.SIGCONT))
	return lease
}

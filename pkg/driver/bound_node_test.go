package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
)

// A loop device that is free, and whose node another program has bound somewhere, is nobody's: that program would have the
// volume, too. Where the volume's own node is bound, the path is named.
func TestBoundNode(t *testing.T) {
	r := newRig(t)
	v := r.create("v", mib*64, mountCapability("ext4"))
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, err)
	defer ctl.Close()
	number, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	must(t, err)
	device := fmt.Sprintf("/dev/loop%d", number)
	foreign := r.bind(device)
	v.publish("pod")
	if a := ok[engine.Attachment](t)(r.client.Attachment(t.Context(), v.id)); a.Device == device {
		t.Errorf("the volume is attached as %s, which is bound to %s", device, foreign)
	}
	v.unstage("pod")
	must(t, unix.Unmount(foreign, 0))

	served, err := r.client.Attach(t.Context(), v.id)
	must(t, err)
	foreign = r.bind(served.Path)
	_, err = r.NodeStageVolume(t.Context(), v.stageRequest())
	if said := status.Convert(err).Message(); status.Code(err) != codes.FailedPrecondition ||
		!strings.Contains(said, foreign) || !strings.Contains(said, served.Path) {
		t.Errorf("%v: does not name %s and %s", err, foreign, served.Path)
	}
	must(t, unix.Unmount(foreign, 0))
	v.stage()
	v.unstage()
	v.delete()
}

// bind mounts a device's node, as another program might.
func (r *rig) bind(device string) (path string) {
	r.t.Helper()
	path = filepath.Join(r.base, "foreign")
	must(r.t, os.WriteFile(path, nil, 0o600))
	must(r.t, unix.Mount(device, path, "", unix.MS_BIND, ""))
	return path
}

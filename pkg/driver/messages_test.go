package driver

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

const troubleshooting = "../../docs/troubleshooting.md"

// notForPeople is what a message never has: Go's words, gRPC's, sizes in bytes.
var notForPeople = regexp.MustCompile(`context (canceled|deadline)|transport:|rpc error|desc =|connection error|\bEOF\b|` +
	`resource exhausted|signal:|exit status|invalid argument|failed precondition|capacity range cannot|0x[0-9a-f]{6}|(^|\s)\d{7,}\b|%!|<nil>`)

// said checks an answer that a claim, a snapshot or a pod shows. The page for its readers quotes it.
func (r *rig) said(err error, code codes.Code, quote string) {
	r.t.Helper()
	if status.Code(err) != code {
		r.t.Errorf("got %v, want %v with %q", err, code, quote)
	}
	r.quoted(status.Convert(err).Message(), quote)
}

// quoted checks a text for people, which their page quotes.
func (r *rig) quoted(text, quote string) {
	r.t.Helper()
	if !regexp.MustCompile(strings.ReplaceAll(regexp.QuoteMeta(quote), "…", ".+")).MatchString(text) {
		r.t.Errorf("got %q, want %q", text, quote)
	}
	text = strings.ReplaceAll(text, r.base, "")
	if bad := notForPeople.FindString(text); bad != "" {
		r.t.Errorf("%q is not for people: %s", bad, text)
	}
	if strings.Contains(text, "\n") {
		r.t.Errorf("more than a line: %q", text)
	}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(text, ": ") {
		if seen[part] {
			r.t.Errorf("%q is said twice: %s", part, text)
		}
		seen[part] = true
	}
	page, pageErr := os.ReadFile(troubleshooting)
	must(r.t, pageErr)
	if !strings.Contains(string(page), quote) {
		r.t.Errorf("docs/troubleshooting.md has no %q", quote)
	}
}

// TestMessagesOfRequests: what a class or a claim asks for in vain.
func TestMessagesOfRequests(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("v", 64*mib, blockCapability(writer))
	v.snapshot("snap")
	create := func(change func(*csi.CreateVolumeRequest)) error {
		req := r.createRequest("new", 64*mib, blockCapability(writer))
		change(req)
		_, err := r.CreateVolume(ctx, req)
		return err
	}
	for _, c := range []struct {
		change func(*csi.CreateVolumeRequest)
		code   codes.Code
		quote  string
	}{
		{func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"speed": "fast"} }, codes.InvalidArgument, `unknown parameter "speed"`},
		{func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"clusterSize": "3K"} }, codes.InvalidArgument, "parameter clusterSize is …; it can be a power of two from 4K to 2M"},
		{func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"clusterSize": "big"} }, codes.InvalidArgument, "it takes bytes, or a number with K or M"},
		{func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"preallocation": "some"} }, codes.InvalidArgument, "it can be off, metadata, falloc or full"},
		{func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"snapshotLimit": "2G"} }, codes.InvalidArgument, "it takes a percentage of the volume's size, as in 200%"},
		{func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[0] = mountCapability("btrfs") }, codes.InvalidArgument, "file system …; it can be ext4, ext3 or xfs"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities[0] = blockCapability(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)
		}, codes.InvalidArgument, "access mode …: a volume lives on one node"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities[0] = mountCapability("ext4")
			q.VolumeCapabilities[0].GetMount().MountFlags = []string{"loop"}
		}, codes.InvalidArgument, "mount option … is not allowed"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeContentSource = contentSourceMessage("snapshot:" + snapshotID(v.id, "snap"))
			q.CapacityRange.RequiredBytes = 8 * mib
		}, codes.OutOfRange, "are asked for, less than the … of its source"},
		{func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = 1 << 50 }, codes.OutOfRange, "are asked for, a volume can have at most …"},
		{func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = 60 << 40 }, codes.ResourceExhausted, "do not fit in the pool of node …, which can promise … more"},
		{func(q *csi.CreateVolumeRequest) {
			q.CapacityRange = &csi.CapacityRange{RequiredBytes: mib + 1, LimitBytes: mib + 2}
		}, codes.OutOfRange, "the volume may have at most …, the smallest possible size is …"},
		{func(q *csi.CreateVolumeRequest) {
			q.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "node-b"}}}}
		}, codes.ResourceExhausted, "the accessibility requirements leave out this node"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeContentSource = contentSourceMessage("snapshot:" + snapshotID(v.id, "snap"))
			q.Parameters = map[string]string{"clusterSize": "4K"}
		}, codes.InvalidArgument, "a copy keeps it"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeContentSource = contentSourceMessage("volume:other")
		}, codes.NotFound, "is not one of this driver's"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeContentSource = contentSourceMessage("volume:" + foreign(t))
		}, codes.ResourceExhausted, "belongs to the pool of another node"},
		{func(q *csi.CreateVolumeRequest) {
			q.VolumeContentSource = contentSourceMessage("snapshot:" + snapshotID(v.id, "gone"))
		}, codes.NotFound, "snapshot … not found"},
	} {
		r.said(create(c.change), c.code, c.quote)
	}
	_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{
		Name: "new", SourceVolumeId: v.id, Parameters: map[string]string{"fsFreeze": "perhaps"},
	})
	r.said(err, codes.InvalidArgument, `it can be "true" or "false"`)
	p, err := pool.Open(r.dir)
	must(t, err)
	must(t, p.AddPendingSnapshot(v.id, pool.PendingSnapshot{Name: "lost", Created: time.Now()}))
	_, err = r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "lost", SourceVolumeId: v.id})
	r.said(err, codes.Internal, "snapshot is lost")
	_, err = r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "none", SourceVolumeId: p.NewID("none")})
	r.said(err, codes.NotFound, "volume not found")
	v.delete()
	_, err = r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "new", SourceVolumeId: v.id})
	r.said(err, codes.NotFound, "was deleted, only its snapshots remain")
}

// TestMessagesOfUse: what keeps a volume from its pod, or from being deleted.
func TestMessagesOfUse(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	v := r.create("v", 64*mib, blockCapability(writer))
	v.publish("vm")
	_, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	r.said(err, codes.FailedPrecondition, "is in use as /dev/loop…")
	_, err = r.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.stagingPath()})
	r.said(err, codes.FailedPrecondition, "the volume is published at …")
	v.unpublish("vm")
	stage := v.stageRequest()
	stage.VolumeCapability = mountCapability("ext4")
	_, err = r.NodeStageVolume(ctx, stage)
	r.said(err, codes.FailedPrecondition, "was made with volumeMode Block, it is not mounted as a file system")
	v.unstage()

	holder := exec.Command("qemu-io", "-c", "sleep 600000", r.dir+"/volumes/"+v.id+"/image.qcow2")
	must(t, holder.Start())
	eventually(t, "QEMU has the image", func() bool {
		_, err = r.NodeStageVolume(ctx, v.stageRequest())
		if err == nil {
			v.unstage()
		}
		return err != nil
	})
	r.said(err, codes.Aborted, "has the image open")
	must(t, holder.Process.Kill())
	_ = holder.Wait()

	r.engine.kill()
	_, err = r.NodeStageVolume(ctx, v.stageRequest())
	r.said(err, codes.Unavailable, "engine.sock does not answer")
	short, cancel := context.WithTimeout(ctx, time.Nanosecond)
	defer cancel()
	r.said(toStatus(context.Cause(short)), codes.DeadlineExceeded, "not finished in time")
	must(t, os.Rename(r.dir, r.dir+".away"))
	must(t, os.Mkdir(r.dir, 0o700))
	_, err = r.NodeStageVolume(ctx, v.stageRequest())
	r.said(err, codes.Unavailable, "pool is not ready: …: it has no pool.json; is its disk mounted?")
	must(t, os.Remove(r.dir))
	must(t, os.Rename(r.dir+".away", r.dir))
}

// TestReasonsAreExplained: the page has each reason of an Event and of a volume's health.
func TestReasonsAreExplained(t *testing.T) {
	page, err := os.ReadFile(troubleshooting)
	must(t, err)
	reason := regexp.MustCompile(`(?:condition\([\w.]+,|EventType\w+,|StorageHealthErrorType_\w+,)\s*"(\w+)"`)
	found := 0
	for _, source := range []string{"health.go", "cluster/health.go", "cluster/claims.go"} {
		text, err := os.ReadFile(source)
		must(t, err)
		for _, match := range reason.FindAllStringSubmatch(string(text), -1) {
			found++
			if !strings.Contains(string(page), "`"+match[1]+"`") {
				t.Errorf("docs/troubleshooting.md does not explain %s", match[1])
			}
		}
	}
	if found < 12 {
		t.Errorf("only %d reasons were found", found)
	}
}

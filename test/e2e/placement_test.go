package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const selectedNode = "volume.kubernetes.io/selected-node"

// With two nodes; TestNode has three.
func TestPlacement(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	all := nodes(s)
	placement(s, all[0], all[1], all[1])
}

// A restore and a clone are made on the node of their source, also when another one was tried first, and say so.
func placement(s *space, here, tried, alsoTried string) {
	s.pvc("data", claim{})
	s.pod("writer", on(here), "data")
	s.ready("writer")
	s.exec("writer", "echo hello >/data/file && sync")
	s.snapshot("snap", "data")

	for _, c := range []struct {
		name   string
		source *core.TypedLocalObjectReference
		tried  string
	}{
		{"restored", fromSnapshot("snap"), ""},
		{"cloned", fromClaim("data"), ""},
		{"restored-elsewhere", fromSnapshot("snap"), tried},
		{"cloned-elsewhere", fromClaim("data"), alsoTried},
	} {
		s.pvc(c.name, claim{source: c.source, tried: c.tried})
		s.event("PersistentVolumeClaim", c.name, "NodeOfSource", here)
	}
	s.pod("reader", anywhere, "restored", "cloned", "restored-elsewhere", "cloned-elsewhere")
	if got := s.ready("reader").Spec.NodeName; got != here {
		s.Errorf("the copies are on %s, their source on %s", got, here)
	}
	for _, name := range []string{"restored", "cloned", "restored-elsewhere", "cloned-elsewhere"} {
		if got := s.read("reader", "cat /"+name+"/file"); got != "hello" {
			s.Errorf("%s holds %q", name, got)
		}
	}
}

// A VolumeSnapshotContent that an administrator makes for a snapshot that exists is found by the snapshot's node.
func TestPreProvisionedSnapshot(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pvc("data", claim{})
	s.pod("writer", nil, "data")
	s.ready("writer")
	s.exec("writer", "echo hello >/data/file && sync")
	s.snapshot("snap", "data")
	handle := s.snapshotHandle("snap")

	name := "pre-" + s.name
	_, err := snapClient.SnapshotV1().VolumeSnapshotContents().Create(s.ctx, &snapshot.VolumeSnapshotContent{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: snapshot.VolumeSnapshotContentSpec{
			Driver: "qcow2.csi.dev", DeletionPolicy: snapshot.VolumeSnapshotContentDelete,
			Source:            snapshot.VolumeSnapshotContentSource{SnapshotHandle: &handle},
			VolumeSnapshotRef: core.ObjectReference{Namespace: s.name, Name: "known"},
		},
	}, meta.CreateOptions{})
	s.check(err)
	_, err = snapClient.SnapshotV1().VolumeSnapshots(s.name).Create(s.ctx, &snapshot.VolumeSnapshot{
		ObjectMeta: meta.ObjectMeta{Name: "known"},
		Spec:       snapshot.VolumeSnapshotSpec{Source: snapshot.VolumeSnapshotSource{VolumeSnapshotContentName: &name}},
	}, meta.CreateOptions{})
	s.check(err)
	s.snapshotReady("known")
	s.pvc("restored", claim{source: fromSnapshot("known")})
	s.pod("reader", nil, "restored")
	s.ready("reader")
	if got := s.read("reader", "cat /restored/file"); got != "hello" {
		t.Errorf("it holds %q", got)
	}
}

// nodes returns the names of the cluster's nodes but for the spare one, sorted.
func nodes(s *space) (names []string) {
	s.Helper()
	list, err := client.CoreV1().Nodes().List(s.ctx, meta.ListOptions{})
	s.check(err)
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return name == spare })
	slices.Sort(names)
	if len(names) < 2 {
		s.Fatalf("the cluster has the nodes %v, the test needs two", names)
	}
	return names
}

// on puts a pod on a node.
func on(node string) func(*core.Pod) {
	return func(pod *core.Pod) {
		anywhere(pod)
		pod.Spec.NodeSelector = map[string]string{core.LabelHostname: node}
	}
}

// anywhere lets a pod run on the spare node, too.
func anywhere(pod *core.Pod) {
	pod.Spec.Tolerations = []core.Toleration{{Key: spareTaint, Operator: core.TolerationOpExists}}
}

// snapshotHandle returns the CSI ID of a snapshot that is ready.
func (s *space) snapshotHandle(name string) string {
	s.Helper()
	got, err := snapClient.SnapshotV1().VolumeSnapshots(s.name).Get(s.ctx, name, meta.GetOptions{})
	s.check(err)
	content, err := snapClient.SnapshotV1().VolumeSnapshotContents().
		Get(s.ctx, *got.Status.BoundVolumeSnapshotContentName, meta.GetOptions{})
	s.check(err)
	return *content.Status.SnapshotHandle
}

// event waits for one about an object, with a reason, whose message has a text in it.
func (s *space) event(kind, name, reason, text string) {
	s.Helper()
	s.eventually(fmt.Sprintf("event %s of %s %s with %q", reason, kind, name, text), func(ctx context.Context) error {
		return s.hasEvent(ctx, kind, name, reason, text)
	})
}

func (s *space) hasEvent(ctx context.Context, kind, name, reason, text string) error {
	events, err := client.CoreV1().Events(s.name).List(ctx, meta.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		return err
	}
	for _, e := range events.Items {
		if e.InvolvedObject.Kind == kind && e.Reason == reason && strings.Contains(e.Message, text) {
			return nil
		}
	}
	return fmt.Errorf("none of %d events", len(events.Items))
}

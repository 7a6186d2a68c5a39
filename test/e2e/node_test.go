package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The spare node is off when the tests start, and takes only pods that ask for it: what happens to it does not concern
// other tests.
const spare, spareTaint = "n3", "spare"

// A node's life: it joins the cluster, its pool gets full, it loses its power, and at last it is gone for good.
func TestNode(t *testing.T) {
	t.Parallel()
	power(t, "up")
	t.Run("Join", func(t *testing.T) { joined(newSpace(t)) })
	t.Run("Placement", func(t *testing.T) {
		s := newSpace(t)
		others := nodes(s)
		placement(s, spare, others[0], others[1])
	})
	t.Run("FullPool", func(t *testing.T) { fullPool(newSpace(t), spare) })
	t.Run("PowerCut", func(t *testing.T) { powerCut(newSpace(t)) })
	t.Run("Loss", func(t *testing.T) { loss(newSpace(t)) })
}

// power switches the spare node on, or off without warning: up, crash.
func power(t *testing.T, what string) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if out, err := exec.CommandContext(ctx, "cluster/node.sh", what, spare, spareTaint).CombinedOutput(); err != nil {
		t.Fatalf("node %s %s: %v: %s", spare, what, err, out)
	}
}

// The driver's parts come to a new node as soon as it has the label, and offer its space.
func joined(s *space) {
	label := []byte(`{"metadata": {"labels": {"qcow2.csi.dev/pool": "true"}}}`)
	s.eventually(spare+" is labelled", func(ctx context.Context) error {
		_, err := client.CoreV1().Nodes().Patch(ctx, spare, types.MergePatchType, label, meta.PatchOptions{})
		return err
	})
	for _, part := range []string{"holder", "engine", "node"} {
		s.driverPod(part, spare)
	}
	s.capacity(spare, 1<<30)
}

// driverPod waits until the driver's pod of a part, "node" for example, is ready on a node, and returns its name.
func (s *space) driverPod(part, node string) (name string) {
	s.Helper()
	s.eventually(part+" on "+node, func(ctx context.Context) error {
		options := component(part)
		options.FieldSelector = "spec.nodeName=" + node
		pods, err := client.CoreV1().Pods(system).List(ctx, options)
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 || !isReady(&pods.Items[0]) {
			return fmt.Errorf("not ready: %d pods", len(pods.Items))
		}
		name = pods.Items[0].Name
		return nil
	})
	return name
}

// After a power cut while a pod writes the node boots, and the pod comes back with everything that had been flushed. So do
// the snapshots.
func powerCut(s *space) {
	s.pvc("data", claim{})
	s.pod("writer", on(spare), "data")
	s.ready("writer")
	d := s.disk("writer", "data", claim{})
	sum := d.fill()
	d.startAppending()
	s.snapshot("snap", "data")
	flushed := d.appended()

	power(s.T, "crash")
	power(s.T, "up")
	s.eventually("the pod to be started again", func(ctx context.Context) error {
		pod, err := client.CoreV1().Pods(s.name).Get(ctx, "writer", meta.GetOptions{})
		if err != nil {
			return err
		}
		if status := pod.Status.ContainerStatuses; !isReady(pod) || len(status) == 0 || status[0].RestartCount == 0 {
			return fmt.Errorf("it is %s: %+v", pod.Status.Phase, status)
		}
		return nil
	})
	if got := d.sum(); got != sum {
		s.Errorf("the content's sum is %s, want %s", got, sum)
	}
	if got := d.records(); got < flushed {
		s.Errorf("there are %d records, %d were flushed", got, flushed)
	}
	restored := claim{source: fromSnapshot("snap")}
	s.pvc("restored", restored)
	s.pod("reader", anywhere, "restored")
	s.ready("reader")
	s.disk("reader", "restored", restored).verify(sum, 1, flushed)
}

// What is left of a node that never comes back is removed as docs/operate.md tells, and nothing else is.
func loss(s *space) {
	for name, node := range map[string]string{"lost": spare, "kept": nodes(s)[0]} {
		s.pvc(name, claim{})
		s.pod(name, on(node), name)
		s.ready(name)
		s.snapshot(name, name)
	}
	kept := s.disk("kept", "kept", claim{})
	sum := kept.fill()
	s.pvc("copy", claim{source: fromSnapshot("lost")})
	s.bound("copy")

	power(s.T, "crash")
	script := documented(s, "docs/operate.md", "## A node is lost")
	cmd := exec.CommandContext(s.ctx, "bash", "-euo", "pipefail", "-c", strings.Replace(script, "=NODE\n", "="+spare+"\n", 1))
	here, err := filepath.Abs("cluster") // kubectl is there
	s.check(err)
	cmd.Env = append(os.Environ(), "PATH="+here+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.Fatalf("%v: %s", err, out)
	}
	s.Logf("%s", out)

	s.eventually("what the node had to go", func(ctx context.Context) error {
		claims, err := client.CoreV1().PersistentVolumeClaims(s.name).List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		snaps, err := snapClient.SnapshotV1().VolumeSnapshots(s.name).List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		pods, err := client.CoreV1().Pods("").List(ctx, meta.ListOptions{FieldSelector: "spec.nodeName=" + spare})
		if err != nil {
			return err
		}
		if len(claims.Items) > 1 || len(snaps.Items) > 1 || len(pods.Items) > 0 {
			return fmt.Errorf("there are %d claims, %d snapshots, %d pods", len(claims.Items), len(snaps.Items), len(pods.Items))
		}
		if c, err := offered(ctx, spare); err != nil || c != nil {
			return fmt.Errorf("its capacity of %s is offered: %w", c, err)
		}
		return nil
	})
	if volume := s.pv("kept"); volume.Status.Phase != core.VolumeBound {
		s.Errorf("the volume on another node is %s", volume.Status.Phase)
	}
	s.snapshotReady("kept")
	if got := kept.sum(); got != sum {
		s.Errorf("the content's sum on another node is %s, want %s", got, sum)
	}
	// The end of the test sees that no volume and no content is left.
}

// documented returns the first example below a heading of a page.
func documented(s *space, page, heading string) string {
	s.Helper()
	_, section, _ := strings.Cut(string(s.shipped(page)), heading+"\n")
	_, example, _ := strings.Cut(section, "\n```\n")
	example, _, ok := strings.Cut(example, "\n```\n")
	if !ok {
		s.Fatalf("%s has no example below %q", page, heading)
	}
	return example
}

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const system = "csi-qcow2" // the driver's namespace

// The plugin's pods are deleted, and all of the driver is updated to another version, while a pod writes: it sees no
// error, and the new version takes over what it finds.
func TestUpdate(t *testing.T) {
	s := newSpace(t)
	s.pvc("data", claim{})
	s.pod("writer", nil, "data")
	s.ready("writer")
	d := s.disk("writer", "data", claim{})
	sum := d.fill()
	d.startAppending()

	s.check(client.CoreV1().Pods(system).DeleteCollection(s.ctx, meta.DeleteOptions{}, component("node")))
	s.updated("node", "e2e")
	before := d.appended()
	s.snapshot("old", "data")

	s.T.Cleanup(func() {
		s.ctx = context.WithoutCancel(s.ctx)
		for _, name := range []string{"node", "engine", "holder"} {
			s.update(name, "e2e")
		}
	})
	for _, name := range []string{"node", "engine", "holder"} {
		s.update(name, "e2e-next")
		after := d.appended()
		if after <= before {
			t.Errorf("nothing was written while %s was updated: %d records", name, after)
		}
		before = after
	}
	s.snapshot("new", "data")
	after := d.appended()
	for name, min := range map[string]int{"old": 1, "new": before} {
		c := claim{source: fromSnapshot(name)}
		s.pvc(name, c)
		s.pod(name, nil, name)
		s.ready(name)
		s.disk(name, name, c).verify(sum, min, after)
	}
	after = d.appended() // no write has failed
	d.stopAppending()
	d.verify(sum, after, d.appended())
}

func component(name string) meta.ListOptions {
	return meta.ListOptions{LabelSelector: "app.kubernetes.io/component=" + name}
}

// update rolls a part of the driver, "node" for example, to another tag, and waits for the last pod.
func (s *space) update(part, tag string) {
	s.Helper()
	set, err := client.AppsV1().DaemonSets(system).Get(s.ctx, "csi-qcow2-"+part, meta.GetOptions{})
	s.check(err)
	for _, containers := range [][]core.Container{set.Spec.Template.Spec.InitContainers, set.Spec.Template.Spec.Containers} {
		for i := range containers {
			if strings.HasPrefix(containers[i].Image, "csi-qcow2:") {
				containers[i].Image = "csi-qcow2:" + tag
			}
		}
	}
	_, err = client.AppsV1().DaemonSets(system).Update(s.ctx, set, meta.UpdateOptions{})
	s.check(err)
	s.updated(part, tag)
}

// updated waits until each node has a pod of a part that is ready and of a tag, and no other.
func (s *space) updated(part, tag string) {
	s.Helper()
	s.eventually(part+" to be "+tag, func(ctx context.Context) error {
		set, err := client.AppsV1().DaemonSets(system).Get(ctx, "csi-qcow2-"+part, meta.GetOptions{})
		if err != nil {
			return err
		}
		pods, err := client.CoreV1().Pods(system).List(ctx, component(part))
		if err != nil {
			return err
		}
		if set.Status.ObservedGeneration < set.Generation || len(pods.Items) != int(set.Status.DesiredNumberScheduled) {
			return fmt.Errorf("%d pods: %+v", len(pods.Items), set.Status)
		}
		for i := range pods.Items {
			p := &pods.Items[i]
			if image := p.Spec.Containers[0].Image; p.DeletionTimestamp != nil || !isReady(p) || image != "csi-qcow2:"+tag {
				return fmt.Errorf("pod %s of %s is %s", p.Name, image, p.Status.Phase)
			}
		}
		return nil
	})
}

// A node loses its power while a pod writes. After it has booted the pod comes back, with everything that had been
// flushed, and so do the snapshots.
func TestPowerCut(t *testing.T) {
	s := newSpace(t)
	all := nodes(s)
	node := all[len(all)-1]
	s.pvc("data", claim{})
	s.pod("writer", on(node), "data")
	s.ready("writer")
	d := s.disk("writer", "data", claim{})
	sum := d.fill()
	d.startAppending()
	s.snapshot("snap", "data")
	flushed := d.appended()

	power(s, "crash", node)
	power(s, "up", node)
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
		t.Errorf("the content's sum is %s, want %s", got, sum)
	}
	if got := d.records(); got < flushed {
		t.Errorf("there are %d records, %d were flushed", got, flushed)
	}
	restored := claim{source: fromSnapshot("snap")}
	s.pvc("restored", restored)
	s.pod("reader", nil, "restored")
	s.ready("reader")
	s.disk("reader", "restored", restored).verify(sum, 1, flushed)
}

// power switches a node off without warning, or on.
func power(s *space, what, node string) {
	s.Helper()
	ctx, stop := context.WithTimeout(s.ctx, time.Minute)
	defer stop()
	if out, err := exec.CommandContext(ctx, "cluster/node.sh", what, node).CombinedOutput(); err != nil {
		s.Fatalf("node %s %s: %v: %s", node, what, err, out)
	}
}

// poolsEmpty tells which directories of volumes are left in the nodes' pools.
func poolsEmpty() error {
	left, err := filepath.Glob(filepath.Join(os.Getenv("STATE"), "n*/var/csi-qcow2/pool/volumes/*"))
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("volumes are left: %v", left)
	}
	pools, _ := filepath.Glob(filepath.Join(os.Getenv("STATE"), "n*/var/csi-qcow2/pool/volumes"))
	if len(pools) == 0 {
		err = errors.Join(err, errors.New("no pool was found"))
	}
	return err
}

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const system = "csi-qcow2" // the driver's namespace

// The plugin's pods are deleted, with another configuration, and all of the driver is updated to another version, while
// pods write, one with many requests at once: they see no error, and the new version takes over what it finds. The tests
// that follow use it.
func TestUpdate(t *testing.T) {
	s := newSpace(t)
	node := nodes(s)[0]
	load, d, sum := s.busyPod(on(node))

	// The ratio is of what is free: in an empty pool it is three times as much but for what the volume is promised.
	plain := s.capacity(node, 1<<30)
	s.configure("overcommit", "3")
	s.restartPlugins()
	s.capacity(node, plain*5/2)
	old := d.appended()
	s.snapshot("old", "data")

	s.configure("overcommit", "1")
	before := old
	for _, name := range []string{"node", "engine", "holder"} {
		s.update(name, "e2e-next")
		after := d.appended()
		if after <= before {
			t.Errorf("nothing was written while %s was updated: %d records", name, after)
		}
		before = after
	}
	load.stopLoad()
	s.capacityBelow(node, plain*3/2)
	s.snapshot("new", "data")
	after := d.appended()
	restored := []string{"old", "new"}
	for _, name := range restored {
		s.pvc(name, claim{source: fromSnapshot(name)})
	}
	s.pod("reader", nil, restored...)
	s.ready("reader")
	for name, min := range map[string]int{"old": old, "new": before} {
		s.disk("reader", name, claim{}).verify(sum, min, after)
	}
	after = d.appended() // no write has failed
	d.stopAppending()
	d.verify(sum, after, d.appended())
}

// configure changes the driver's ConfigMap. Its pods take no notice until they are started again.
func (s *space) configure(key, value string) {
	s.Helper()
	patch := fmt.Sprintf(`{"data": {%q: %q}}`, key, value)
	_, err := client.CoreV1().ConfigMaps(system).
		Patch(s.ctx, "csi-qcow2", types.MergePatchType, []byte(patch), meta.PatchOptions{})
	s.check(err)
}

// restartPlugins deletes the pods of the plugin and waits for the next ones.
func (s *space) restartPlugins() {
	s.Helper()
	s.check(client.CoreV1().Pods(system).DeleteCollection(s.ctx, meta.DeleteOptions{}, component("node")))
	s.updated("node", version(s.T))
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

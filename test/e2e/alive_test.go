package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// away is how long the plugin's pool and engine are away. Kubelet kills a container whose liveness fails after 2.5 minutes.
const away = 10 * time.Minute

// A plugin without a pool and without an engine is alive: the official livenessprobe has no reason to kill it, and nothing would
// be better after that. A plugin that cannot be reached is killed.
func TestAlive(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pluginPod("alive", "unix:///csi/csi.sock")
	s.pluginPod("unreachable", "unix:///csi/other.sock")
	start := time.Now()
	for time.Since(start) < away {
		if n := s.restarts("alive"); n > 0 {
			t.Fatalf("the plugin was started again after %s", time.Since(start))
		}
		s.Log(time.Since(start).Round(time.Second), s.restarts("unreachable"))
		select {
		case <-time.After(30 * time.Second):
		case <-t.Context().Done():
			return
		}
	}
	if s.restarts("unreachable") == 0 {
		t.Error("a plugin that cannot be reached was not started again: this test proves nothing")
	}
}

// pluginPod starts the plugin and the livenessprobe of the driver's manifests, with neither a pool nor an engine. The probe asks
// at unix:///csi/csi.sock.
func (s *space) pluginPod(name, endpoint string) {
	s.Helper()
	set, err := client.AppsV1().DaemonSets(system).Get(s.ctx, "csi-qcow2-node", meta.GetOptions{})
	s.check(err)
	var containers []core.Container
	for _, c := range set.Spec.Template.Spec.Containers {
		switch c.Name {
		case "csi-qcow2":
			c.Args = []string{"node", "--endpoint=" + endpoint, "--engine=unix:///csi/no-engine.sock", "--node-id=nowhere", "--pool=/csi/no-pool"}
			c.Env = nil
		case "liveness-probe":
		default:
			continue
		}
		c.VolumeMounts = []core.VolumeMount{{Name: "plugin", MountPath: "/csi"}}
		containers = append(containers, c)
	}
	if len(containers) != 2 || containers[0].LivenessProbe == nil {
		s.Fatalf("the manifests have no plugin with a liveness probe: %+v", containers)
	}
	pod := &core.Pod{ObjectMeta: meta.ObjectMeta{Name: name}}
	pod.Spec.NodeName = nodes(s)[0]
	pod.Spec.Containers = containers
	pod.Spec.Volumes = []core.Volume{{Name: "plugin", VolumeSource: core.VolumeSource{EmptyDir: &core.EmptyDirVolumeSource{}}}}
	_, err = client.CoreV1().Pods(s.name).Create(s.ctx, pod, meta.CreateOptions{})
	s.check(err)
	s.eventually(name+" to run", func(ctx context.Context) error {
		p, err := client.CoreV1().Pods(s.name).Get(ctx, name, meta.GetOptions{})
		if err == nil && p.Status.Phase != core.PodRunning {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
}

// restarts returns how often the plugin of a pluginPod was started again.
func (s *space) restarts(pod string) (n int32) {
	s.Helper()
	p, err := client.CoreV1().Pods(s.name).Get(s.ctx, pod, meta.GetOptions{})
	s.check(err)
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == "csi-qcow2" {
			n = c.RestartCount
		}
	}
	return n
}

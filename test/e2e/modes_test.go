package e2e

import (
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
)

// A generic ephemeral volume, a group's volume, a part of a volume and a read-only one, in one pod of a user who is
// not root.
func TestMounts(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pvc("data", claim{class: "csi-qcow2-xfs"})
	s.pod("pod", func(pod *core.Pod) {
		pod.Spec.SecurityContext = &core.PodSecurityContext{RunAsUser: new(int64(1000)), FSGroup: new(int64(2000))}
		pod.Spec.Volumes = append(pod.Spec.Volumes, core.Volume{Name: "scratch", VolumeSource: core.VolumeSource{
			Ephemeral: &core.EphemeralVolumeSource{VolumeClaimTemplate: &core.PersistentVolumeClaimTemplate{Spec: claim{}.spec()}},
		}})
		c := &pod.Spec.Containers[0]
		c.VolumeMounts = append(c.VolumeMounts,
			core.VolumeMount{Name: "scratch", MountPath: "/scratch"},
			core.VolumeMount{Name: "data", MountPath: "/part", SubPath: "a/part"},
			core.VolumeMount{Name: "data", MountPath: "/seen", ReadOnly: true})
	}, "data")
	s.ready("pod")
	for _, dir := range []string{"/scratch", "/data"} {
		if got := s.exec("pod", "touch "+dir+"/file && stat -c %g "+dir+"/file"); got != "2000" {
			t.Errorf("a file in %s belongs to the group %s", dir, got)
		}
	}
	s.exec("pod", "echo hello >/part/file")
	if got := s.read("pod", "cat /data/a/part/file /seen/a/part/file"); got != "hello\nhello" {
		t.Errorf("what was written in a part of the volume reads as %q", got)
	}
	if _, err := s.tryExec("pod", "touch /seen/file"); err == nil || !strings.Contains(err.Error(), "Read-only") {
		t.Errorf("writing to the read-only mount: %v", err)
	}
	// The test's end sees that the ephemeral volume went with its pod.
}

// A ReadWriteOncePod claim is one pod's.
func TestReadWriteOncePod(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pvc("data", claim{mode: core.ReadWriteOncePod})
	s.pod("first", nil, "data")
	s.ready("first")
	s.pod("second", nil, "data")
	s.event("Pod", "second", "FailedScheduling", "ReadWriteOncePod")
	s.deletePod("first")
	s.ready("second")
}

package e2e

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

const manifests = "../../deploy/kubernetes/overlays/snapshot-controller"

// What `kubectl apply -k` sends is what the API server has: an object has a namespace if its kind wants one, the driver's
// image the version of the checkout, and no image is asked for again that the node has already.
func TestManifests(t *testing.T) {
	groups, err := restmapper.GetAPIGroupResources(client.Discovery())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	image := "csi-qcow2:" + version(t)
	containers := 0
	for _, o := range rendered(t) {
		kind := o.GroupVersionKind()
		mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
		if err != nil {
			t.Fatal(err)
		}
		if namespaced := mapping.Scope.Name() == meta.RESTScopeNameNamespace; namespaced != (o.GetNamespace() != "") {
			t.Errorf("%s %s has the namespace %q", kind.Kind, o.GetName(), o.GetNamespace())
		}
		if kind.Kind == "Deployment" {
			var d apps.Deployment
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d); err != nil {
				t.Fatal(err)
			}
			leastPrivilege(t, o.GetName(), d.Spec.Template.Spec)
		}
		if kind.Kind != "DaemonSet" {
			continue
		}
		var daemons apps.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &daemons); err != nil {
			t.Fatal(err)
		}
		pod := daemons.Spec.Template.Spec
		leastPrivilege(t, o.GetName(), pod)
		if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
			t.Errorf("%s: every container gets a token", o.GetName())
		}
		for _, c := range append(pod.InitContainers, pod.Containers...) {
			if !strings.HasPrefix(c.Image, "csi-qcow2") {
				continue
			}
			containers++
			if c.Image != image || c.ImagePullPolicy != core.PullIfNotPresent {
				t.Errorf("%s, container %s: image %s, pull policy %q", o.GetName(), c.Name, c.Image, c.ImagePullPolicy)
			}
		}
	}
	if containers != 4 {
		t.Errorf("%d containers of the driver were found", containers)
	}
}

// leastPrivilege checks that a container without block devices and mounts of its own can do nothing else.
func leastPrivilege(t *testing.T, name string, pod core.PodSpec) {
	t.Helper()
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		may := c.SecurityContext
		if may == nil || may.ReadOnlyRootFilesystem == nil || !*may.ReadOnlyRootFilesystem {
			t.Errorf("%s, container %s: can write to its root file system", name, c.Name)
			continue
		}
		if may.Privileged != nil && *may.Privileged {
			continue
		}
		if may.AllowPrivilegeEscalation == nil || *may.AllowPrivilegeEscalation || may.Capabilities == nil ||
			!slices.Contains(may.Capabilities.Drop, "ALL") || may.SeccompProfile == nil || may.SeccompProfile.Type != core.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s, container %s: %v", name, c.Name, may)
		}
	}
}

// A node's account, whose token says on which node it is used, writes nothing of other nodes.
func TestPolicies(t *testing.T) {
	s := newSpace(t)
	volume := func(name, node, driver string) *core.PersistentVolume {
		return &core.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: core.PersistentVolumeSpec{
				Capacity:               core.ResourceList{core.ResourceStorage: resource.MustParse("1Gi")},
				AccessModes:            []core.PersistentVolumeAccessMode{core.ReadWriteOnce},
				PersistentVolumeSource: core.PersistentVolumeSource{CSI: &core.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: name}},
				NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
					MatchExpressions: []core.NodeSelectorRequirement{{Key: "topology.qcow2.csi.dev/node", Operator: core.NodeSelectorOpIn, Values: []string{node}}},
				}}}},
			},
		}
	}
	as := func(node string) *kubernetes.Clientset {
		config := rest.CopyConfig(restConfig)
		config.Impersonate = rest.ImpersonationConfig{
			UserName: "system:serviceaccount:csi-qcow2:csi-qcow2-node",
			Extra:    map[string][]string{"authentication.kubernetes.io/node-name": {node}},
		}
		return kubernetes.NewForConfigOrDie(config)
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	for _, c := range []struct {
		name, of, driver string
		allowed          bool
	}{
		{"own", "n1", "qcow2.csi.dev", true},
		{"of another node", "n2", "qcow2.csi.dev", false},
		{"of another driver", "n1", "other.csi.dev", false},
	} {
		_, err := as("n1").CoreV1().PersistentVolumes().Create(s.ctx, volume("policy", c.of, c.driver), dry)
		if (err == nil) != c.allowed {
			t.Errorf("make a PersistentVolume %s: %v", c.name, err)
		}
	}
	claim, err := client.CoreV1().PersistentVolumeClaims(s.name).Create(s.ctx, &core.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: "policy"},
		Spec: core.PersistentVolumeClaimSpec{
			AccessModes: []core.PersistentVolumeAccessMode{core.ReadWriteOnce}, StorageClassName: new(string),
			Resources: core.VolumeResourceRequirements{Requests: core.ResourceList{core.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}, metav1.CreateOptions{})
	s.check(err)
	for patch, allowed := range map[string]bool{
		`{"metadata":{"annotations":{"volume.kubernetes.io/selected-node":"n1"}}}`: true,
		`{"metadata":{"annotations":{"volume.kubernetes.io/selected-node":"n2"}}}`: false,
		`{"spec":{"volumeName":"stolen"}}`:                                         false,
	} {
		_, err := as("n1").CoreV1().PersistentVolumeClaims(s.name).Patch(s.ctx, claim.Name, types.MergePatchType, []byte(patch),
			metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		if (err == nil) != allowed {
			t.Errorf("patch a claim with %s: %v", patch, err)
		}
	}
	for node, allowed := range map[string]bool{"n1": true, "n2": false} {
		_, err := as("n1").StorageV1().CSIStorageCapacities("csi-qcow2").Create(s.ctx, &storage.CSIStorageCapacity{
			ObjectMeta:       metav1.ObjectMeta{Name: "policy"},
			StorageClassName: "csi-qcow2",
			NodeTopology:     &metav1.LabelSelector{MatchLabels: map[string]string{"topology.qcow2.csi.dev/node": node}},
		}, dry)
		if (err == nil) != allowed {
			t.Errorf("tell the capacity of %s: %v", node, err)
		}
	}
}

// The image says what is in it, as scanners want it.
func TestImageListsItsPackages(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "cluster/kubectl", "-n", "csi-qcow2", "exec", "ds/csi-qcow2-node", "-c", "csi-qcow2", "--",
		"cat", "/var/lib/dpkg/status", "/etc/os-release").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"Package: e2fsprogs\n", "Package: libc6\n", "Package: xfsprogs\n", "ID=debian\n"} {
		if !strings.Contains(string(out), line) {
			t.Errorf("the image does not list %q", line)
		}
	}
}

// version returns what the checkout's manifests, image and program call themselves.
func version(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// rendered returns the objects of the shipped manifests.
func rendered(t *testing.T) []*unstructured.Unstructured {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "cluster/kubectl", "kustomize", manifests).Output()
	if err != nil {
		t.Fatal(err)
	}
	var objects []*unstructured.Unstructured
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(out), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := decoder.Decode(o)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, o)
	}
}

// A node that has a udev gets the rule that keeps it from looking into volumes.
func TestUdevRule(t *testing.T) {
	want, err := os.ReadFile("../../deploy/kubernetes/base/udev/59-csi-qcow2.rules")
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes(newSpace(t)) {
		init, err := os.ReadFile(filepath.Join(os.Getenv("STATE"), node, "pid"))
		if err != nil {
			t.Fatal(err)
		}
		pid := strings.TrimSpace(string(init))
		children, err := os.ReadFile(filepath.Join("/proc", pid, "task", pid, "children"))
		if err != nil {
			t.Fatal(err)
		}
		first := strings.Fields(string(children))[0] // the first process of the node's namespaces
		got, err := os.ReadFile(filepath.Join("/proc", first, "root/run/udev/rules.d/59-csi-qcow2.rules"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s has %q: %v", node, got, err)
		}
	}
}

package e2e

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
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
		if kind.Kind != "DaemonSet" {
			continue
		}
		var daemons apps.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &daemons); err != nil {
			t.Fatal(err)
		}
		pod := daemons.Spec.Template.Spec
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

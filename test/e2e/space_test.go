package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
)

const image = "localhost/busybox:e2e"

// space is a namespace that one test has for itself. At the test's end it is deleted with all that is in it, and the
// test fails if a volume or snapshot of it is left in the cluster.
type space struct {
	*testing.T
	ctx  context.Context
	name string
}

func newSpace(t *testing.T) *space {
	t.Helper()
	ns, err := client.CoreV1().Namespaces().Create(t.Context(), &core.Namespace{
		ObjectMeta: meta.ObjectMeta{GenerateName: "e2e-"},
	}, meta.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &space{T: t, ctx: t.Context(), name: ns.Name}
	t.Cleanup(func() {
		s.ctx = context.WithoutCancel(s.ctx) // a test's context ends before its cleanup
		if t.Failed() {
			s.describe()
		}
		s.remove()
	})
	s.eventually("service account", func(ctx context.Context) error {
		_, err := client.CoreV1().ServiceAccounts(s.name).Get(ctx, "default", meta.GetOptions{})
		return err
	})
	return s
}

// remove deletes the namespace and waits until nothing that belonged to it is left. What is in it goes first: an emptied
// namespace goes at once, one that is not is looked at again every eight seconds.
func (s *space) remove() {
	s.deleteAll()
	s.nothingLeft()
	s.check(client.CoreV1().Namespaces().Delete(s.ctx, s.name, meta.DeleteOptions{}))
	s.eventually("namespace to go", func(ctx context.Context) error {
		_, err := client.CoreV1().Namespaces().Get(ctx, s.name, meta.GetOptions{})
		return gone(err)
	})
}

// deleteAll deletes pods, claims and snapshots at once, in no order: volumes wait as tombstones for their last snapshot.
func (s *space) deleteAll() {
	s.Helper()
	everything := meta.ListOptions{}
	s.check(client.CoreV1().Pods(s.name).DeleteCollection(s.ctx, meta.DeleteOptions{}, everything))
	s.check(client.CoreV1().PersistentVolumeClaims(s.name).DeleteCollection(s.ctx, meta.DeleteOptions{}, everything))
	s.check(snapClient.SnapshotV1().VolumeSnapshots(s.name).DeleteCollection(s.ctx, meta.DeleteOptions{}, everything))
}

// nothingLeft waits until no volume and no snapshot belongs to the namespace.
func (s *space) nothingLeft() {
	s.Helper()
	s.eventually("volumes and snapshots to go", func(ctx context.Context) error {
		volumes, err := client.CoreV1().PersistentVolumes().List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		for _, v := range volumes.Items {
			if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == s.name {
				return fmt.Errorf("PersistentVolume %s is %s", v.Name, v.Status.Phase)
			}
		}
		contents, err := snapClient.SnapshotV1().VolumeSnapshotContents().List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		for _, c := range contents.Items {
			if c.Spec.VolumeSnapshotRef.Namespace == s.name {
				return fmt.Errorf("VolumeSnapshotContent %s is there", c.Name)
			}
		}
		return nil
	})
}

// describe logs what helps to understand a failure.
func (s *space) describe() {
	if events, err := client.CoreV1().Events(s.name).List(s.ctx, meta.ListOptions{}); err == nil {
		for _, e := range events.Items {
			s.Logf("event: %s %s: %s: %s", e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	if pods, err := client.CoreV1().Pods(s.name).List(s.ctx, meta.ListOptions{}); err == nil {
		for _, p := range pods.Items {
			s.Logf("pod %s on %q: %s", p.Name, p.Spec.NodeName, p.Status.Phase)
		}
	}
}

func (s *space) check(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// eventually waits until fn returns nil, and fails the test with its last error if it never does.
func (s *space) eventually(what string, fn func(context.Context) error) {
	s.Helper()
	var last error
	err := wait.PollUntilContextTimeout(s.ctx, 100*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		last = fn(ctx)
		return last == nil, nil
	})
	if err != nil {
		s.Fatalf("waiting for %s: %v: %v", what, err, last)
	}
}

// A claim is what a test asks for with a PersistentVolumeClaim.
type claim struct {
	class string // csi-qcow2 if empty
	size  string // 1Gi if empty
	block bool
	// source is the volume's first content: a VolumeSnapshot or a PersistentVolumeClaim.
	source *core.TypedLocalObjectReference
	mode   core.PersistentVolumeAccessMode // ReadWriteOnce if empty
	// tried is the node that the scheduler has selected, so to speak.
	tried string
}

func fromSnapshot(name string) *core.TypedLocalObjectReference {
	group := snapshot.GroupName
	return &core.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: name}
}

func fromClaim(name string) *core.TypedLocalObjectReference {
	return &core.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: name}
}

func (c claim) spec() core.PersistentVolumeClaimSpec {
	class, size, mode := c.class, c.size, c.mode
	if class == "" {
		class = "csi-qcow2"
	}
	if size == "" {
		size = "1Gi"
	}
	if mode == "" {
		mode = core.ReadWriteOnce
	}
	volumeMode := core.PersistentVolumeFilesystem
	if c.block {
		volumeMode = core.PersistentVolumeBlock
	}
	return core.PersistentVolumeClaimSpec{
		StorageClassName: &class,
		AccessModes:      []core.PersistentVolumeAccessMode{mode},
		VolumeMode:       &volumeMode,
		DataSource:       c.source,
		Resources:        core.VolumeResourceRequirements{Requests: core.ResourceList{core.ResourceStorage: resource.MustParse(size)}},
	}
}

// pvc creates a claim.
func (s *space) pvc(name string, c claim) {
	s.Helper()
	pvc := &core.PersistentVolumeClaim{ObjectMeta: meta.ObjectMeta{Name: name}, Spec: c.spec()}
	if c.tried != "" {
		pvc.Annotations = map[string]string{selectedNode: c.tried}
	}
	_, err := client.CoreV1().PersistentVolumeClaims(s.name).Create(s.ctx, pvc, meta.CreateOptions{})
	s.check(err)
}

// deletePVC deletes a claim and waits until it is gone.
func (s *space) deletePVC(name string) {
	s.Helper()
	claims := client.CoreV1().PersistentVolumeClaims(s.name)
	s.check(claims.Delete(s.ctx, name, meta.DeleteOptions{}))
	s.eventually("claim "+name+" to go", func(ctx context.Context) error {
		_, err := claims.Get(ctx, name, meta.GetOptions{})
		return gone(err)
	})
}

// gone is nil for the error of a Get whose object is not there.
func gone(err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err == nil:
		return errors.New("it is still there")
	}
	return err
}

// expand asks for a larger volume and waits until the claim has it.
func (s *space) expand(name, size string) {
	s.Helper()
	claims := client.CoreV1().PersistentVolumeClaims(s.name)
	patch := fmt.Sprintf(`{"spec": {"resources": {"requests": {"storage": %q}}}}`, size)
	_, err := claims.Patch(s.ctx, name, types.MergePatchType, []byte(patch), meta.PatchOptions{})
	s.check(err)
	s.eventuallyClaim(name, func(got *core.PersistentVolumeClaim) error {
		if got.Status.Capacity.Storage().Cmp(resource.MustParse(size)) < 0 {
			return fmt.Errorf("it has %s: %+v", got.Status.Capacity.Storage(), got.Status.Conditions)
		}
		return nil
	})
}

// eventuallyClaim waits until fn has no objection to a claim.
func (s *space) eventuallyClaim(name string, fn func(*core.PersistentVolumeClaim) error) {
	s.Helper()
	s.eventually("claim "+name, func(ctx context.Context) error {
		got, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(ctx, name, meta.GetOptions{})
		if err != nil {
			return err
		}
		return fn(got)
	})
}

// pv returns the volume of a bound claim.
func (s *space) pv(claim string) *core.PersistentVolume {
	s.Helper()
	pvc, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(s.ctx, claim, meta.GetOptions{})
	s.check(err)
	pv, err := client.CoreV1().PersistentVolumes().Get(s.ctx, pvc.Spec.VolumeName, meta.GetOptions{})
	s.check(err)
	return pv
}

// pod starts a pod that uses claims, each at /NAME or, a block volume, as /dev/NAME. It runs until it is deleted.
func (s *space) pod(name string, change func(*core.Pod), claims ...string) {
	s.Helper()
	pod := &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: core.PodSpec{
			TerminationGracePeriodSeconds: new(int64(1)),
			Containers:                    []core.Container{{Name: "main", Image: image, Command: []string{"/bin/pause"}}},
		},
	}
	c := &pod.Spec.Containers[0]
	for _, name := range claims {
		pod.Spec.Volumes = append(pod.Spec.Volumes, core.Volume{Name: name, VolumeSource: core.VolumeSource{
			PersistentVolumeClaim: &core.PersistentVolumeClaimVolumeSource{ClaimName: name},
		}})
		pvc, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(s.ctx, name, meta.GetOptions{})
		s.check(err)
		if *pvc.Spec.VolumeMode == core.PersistentVolumeBlock {
			c.VolumeDevices = append(c.VolumeDevices, core.VolumeDevice{Name: name, DevicePath: "/dev/" + name})
		} else {
			c.VolumeMounts = append(c.VolumeMounts, core.VolumeMount{Name: name, MountPath: "/" + name})
		}
	}
	if change != nil {
		change(pod)
	}
	_, err := client.CoreV1().Pods(s.name).Create(s.ctx, pod, meta.CreateOptions{})
	s.check(err)
}

// ready waits until a pod is, and returns it.
func (s *space) ready(name string) *core.Pod {
	s.Helper()
	var pod *core.Pod
	s.eventually("pod "+name, func(ctx context.Context) (err error) {
		pod, err = client.CoreV1().Pods(s.name).Get(ctx, name, meta.GetOptions{})
		if err == nil && !isReady(pod) {
			err = fmt.Errorf("it is %s: %+v", pod.Status.Phase, pod.Status.Conditions)
		}
		return err
	})
	return pod
}

func isReady(pod *core.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c core.PodCondition) bool {
		return c.Type == core.PodReady && c.Status == core.ConditionTrue
	})
}

// deletePod deletes a pod and waits until it is gone.
func (s *space) deletePod(name string) {
	s.Helper()
	s.check(client.CoreV1().Pods(s.name).Delete(s.ctx, name, meta.DeleteOptions{}))
	s.eventually("pod "+name+" to go", func(ctx context.Context) error {
		_, err := client.CoreV1().Pods(s.name).Get(ctx, name, meta.GetOptions{})
		return gone(err)
	})
}

// exec runs a shell script in a pod and returns what it prints.
func (s *space) exec(pod, script string) string {
	s.Helper()
	out, err := s.tryExec(pod, script)
	if err != nil {
		s.Fatalf("in pod %s: %s: %v", pod, script, err)
	}
	return out
}

// read is exec of a script that changes nothing, and so can be run again when its output was cut.
func (s *space) read(pod, script string) string {
	s.Helper()
	for range 3 {
		out, err := s.tryExec(pod, script)
		if err == nil {
			return out
		}
		s.Logf("in pod %s: %s: %v", pod, script, err)
		if !errors.Is(err, errCut) {
			break
		}
	}
	s.FailNow()
	return ""
}

// eventuallyExec waits until a shell script in a pod succeeds.
func (s *space) eventuallyExec(pod, script string) {
	s.Helper()
	s.eventually(script+" in pod "+pod, func(context.Context) error {
		_, err := s.tryExec(pod, script)
		return err
	})
}

func (s *space) tryExec(pod, script string) (string, error) {
	return s.execIn(s.name, pod, "main", script)
}

// errCut is of an exec that succeeded and of whose output the end is missing: on a busy machine a runtime may lose it.
var errCut = errors.New("the end of its output was lost")

const endOfOutput = "-- end of output --"

// execIn runs a shell script in a container.
func (s *space) execIn(namespace, pod, container, script string) (string, error) {
	req := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&core.PodExecOptions{
			Container: container, Command: []string{"/bin/sh", "-ec", script + "\necho '" + endOfOutput + "'"}, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	executor, err := remotecommand.NewSPDYExecutor(restConfig, http.MethodPost, req.URL())
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	err = executor.StreamWithContext(s.ctx, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr})
	out, whole := strings.CutSuffix(strings.TrimSpace(stdout.String()), endOfOutput)
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %s", err, stderr.String())
	case !whole:
		err = fmt.Errorf("%w after %q", errCut, out)
	}
	return strings.TrimSpace(out), err
}

// snapshot creates a VolumeSnapshot of a claim and waits until it can be restored.
func (s *space) snapshot(name, claim string) {
	s.Helper()
	s.createSnapshot(name, claim)
	s.snapshotReady(name)
}

func (s *space) createSnapshot(name, claim string) {
	s.Helper()
	_, err := snapClient.SnapshotV1().VolumeSnapshots(s.name).Create(s.ctx, &snapshot.VolumeSnapshot{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: snapshot.VolumeSnapshotSpec{
			VolumeSnapshotClassName: new("csi-qcow2"),
			Source:                  snapshot.VolumeSnapshotSource{PersistentVolumeClaimName: &claim},
		},
	}, meta.CreateOptions{})
	s.check(err)
}

func (s *space) snapshotReady(name string) {
	s.Helper()
	s.eventually("snapshot "+name, func(ctx context.Context) error {
		got, err := snapClient.SnapshotV1().VolumeSnapshots(s.name).Get(ctx, name, meta.GetOptions{})
		if err != nil {
			return err
		}
		if got.Status == nil || got.Status.ReadyToUse == nil || !*got.Status.ReadyToUse {
			return fmt.Errorf("not ready: %+v", got.Status)
		}
		return nil
	})
}

package cluster

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	fakesnapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/typed/volumesnapshot/v1/fake"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	fakecore "k8s.io/client-go/kubernetes/typed/core/v1/fake"
	fakestorage "k8s.io/client-go/kubernetes/typed/storage/v1/fake"
	clienttesting "k8s.io/client-go/testing"
)

const driver = "qcow2.csi.dev"

// api is an API server of which only the objects are real.
type api struct {
	*testing.T
	clienttesting.Fake
	tracker clienttesting.ObjectTracker
	ready   atomic.Bool // the pool is
}

// start runs node n1's part, whose pool has the handles that begin with "here", beside some objects.
func start(t *testing.T, objects ...runtime.Object) *api {
	t.Helper()
	scheme := newScheme()
	_ = storage.AddToScheme(scheme)
	a := &api{T: t, tracker: clienttesting.NewObjectTracker(scheme, serializer.NewCodecFactory(scheme).UniversalDecoder())}
	a.ready.Store(true)
	a.AddReactor("*", "*", clienttesting.ObjectReaction(a.tracker))
	a.AddWatchReactor("*", func(action clienttesting.Action) (bool, watch.Interface, error) {
		if options := action.(clienttesting.WatchActionImpl).ListOptions; options.SendInitialEvents != nil {
			// What a server answers that does not know this: it is asked for a list then.
			return true, nil, apierrors.NewInvalid(schema.GroupKind{}, "", nil)
		}
		w, err := a.tracker.Watch(action.GetResource(), action.GetNamespace())
		return true, w, err
	})
	for _, o := range append(objects, &storage.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "ours"}, Provisioner: driver},
		&storage.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, Provisioner: "theirs.example.com"}) {
		if err := a.tracker.Add(o); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() { Run(ctx, a.options()) })
	t.Cleanup(func() { stop(); group.Wait() })
	return a
}

func (a *api) options() Options {
	return Options{
		Clients: Clients{
			Core: &fakecore.FakeCoreV1{Fake: &a.Fake}, Storage: &fakestorage.FakeStorageV1{Fake: &a.Fake},
			Snapshots: &fakesnapshot.FakeSnapshotV1{Fake: &a.Fake},
		},
		Driver: driver, Node: "n1",
		Owns: func(handle string) (bool, error) {
			if !a.ready.Load() {
				return false, errors.New("no pool yet")
			}
			return strings.HasPrefix(handle, "here"), nil
		},
		Attached: func(context.Context) ([]Volume, error) { return nil, nil },
	}
}

// patched waits until an object is, and returns what it is then.
func (a *api) patched(name string) metav1.Object {
	a.Helper()
	for {
		for _, action := range a.Actions() {
			patch, ok := action.(clienttesting.PatchAction)
			if !ok || patch.GetName() != name {
				continue
			}
			if o, err := a.tracker.Get(patch.GetResource(), patch.GetNamespace(), name); err == nil {
				accessor, err := meta.Accessor(o)
				if err != nil {
					a.Fatal(err)
				}
				return accessor
			}
		}
		a.wait()
	}
}

// wait lets some time pass, unless the test ends.
func (a *api) wait() {
	select {
	case <-a.Context().Done():
	case <-time.After(10 * time.Millisecond):
	}
}

// patches returns the names of the objects that were patched.
func (a *api) patches() (names []string) {
	for _, action := range a.Actions() {
		if patch, ok := action.(clienttesting.PatchAction); ok {
			names = append(names, patch.GetName())
		}
	}
	slices.Sort(names)
	return names
}

// claim returns one of a class, whose source is a kind and a name.
func claim(name, class, kind, source string) *core.PersistentVolumeClaim {
	return &core.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-of-" + name)},
		Spec: core.PersistentVolumeClaimSpec{
			StorageClassName: &class, DataSourceRef: &core.TypedObjectReference{Kind: kind, Name: source},
		},
	}
}

// boundClaim returns a claim and its volume.
func boundClaim(name, handle string) []runtime.Object {
	return []runtime.Object{
		&core.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
			Spec:       core.PersistentVolumeClaimSpec{VolumeName: "volume-of-" + name},
		},
		&core.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: "volume-of-" + name},
			Spec: core.PersistentVolumeSpec{PersistentVolumeSource: core.PersistentVolumeSource{
				CSI: &core.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle},
			}},
		},
	}
}

// takenSnapshot returns a snapshot and its content, which has the label of a node already.
func takenSnapshot(name, handle string) []runtime.Object {
	contentName := "content-of-" + name
	return []runtime.Object{
		&snapshot.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
			Status:     &snapshot.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &contentName},
		},
		&snapshot.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: contentName},
			Spec:       snapshot.VolumeSnapshotContentSpec{Driver: driver},
			Status:     &snapshot.VolumeSnapshotContentStatus{SnapshotHandle: &handle},
		},
	}
}

func content(name, driver string, source snapshot.VolumeSnapshotContentSource) *snapshot.VolumeSnapshotContent {
	return &snapshot.VolumeSnapshotContent{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       snapshot.VolumeSnapshotContentSpec{Driver: driver, Source: source},
	}
}

// Claims whose source is in the node's pool get the node, others nothing.
func TestClaims(t *testing.T) {
	bound := claim("bound", "ours", "VolumeSnapshot", "here")
	bound.Spec.VolumeName = "some"
	going := claim("going", "ours", "VolumeSnapshot", "here")
	going.DeletionTimestamp, going.Finalizers = &metav1.Time{Time: time.Unix(1, 0)}, []string{"kept"}
	has := claim("has", "ours", "VolumeSnapshot", "here")
	has.Annotations = map[string]string{selectedNode: "n1"}
	foreign := claim("foreign-namespace", "ours", "VolumeSnapshot", "here")
	foreign.Spec.DataSourceRef.Namespace = new("other")
	blank := claim("blank", "ours", "", "")
	blank.Spec.DataSourceRef = nil
	tried := claim("tried-elsewhere", "ours", "VolumeSnapshot", "here")
	tried.Annotations = map[string]string{selectedNode: "n2", "kept": "yes"}

	objects := []runtime.Object{
		claim("restored", "ours", "VolumeSnapshot", "here"), claim("cloned", "ours", "PersistentVolumeClaim", "source"), tried,
		claim("restored-elsewhere", "ours", "VolumeSnapshot", "there"), claim("cloned-elsewhere", "ours", "PersistentVolumeClaim", "far"),
		claim("not-ours", "theirs", "VolumeSnapshot", "here"), claim("populated", "ours", "Populator", "here"),
		bound, going, has, foreign, blank,
	}
	for _, more := range [][]runtime.Object{
		takenSnapshot("here", "here@s"), takenSnapshot("there", "there@s"), boundClaim("source", "here-v"), boundClaim("far", "there-v"),
	} {
		objects = append(objects, more...)
	}
	a := start(t, objects...)
	for _, name := range []string{"restored", "cloned", "tried-elsewhere"} {
		if got := a.patched(name).GetAnnotations()[selectedNode]; got != "n1" {
			t.Errorf("claim %s has the node %q", name, got)
		}
	}
	if a.patched("tried-elsewhere").GetAnnotations()["kept"] != "yes" {
		t.Error("another annotation is gone")
	}
	// The last in the queue shows that all were looked at.
	a.create("persistentvolumeclaims", claim("last", "ours", "VolumeSnapshot", "here"))
	a.patched("last")
	if got, want := a.patches(), []string{"cloned", "last", "restored", "tried-elsewhere"}; !slices.Equal(got, want) {
		t.Errorf("patched are %v, want %v", got, want)
	}
}

// What is not known yet is asked again.
func TestLateSource(t *testing.T) {
	a := start(t, claim("restored", "ours", "VolumeSnapshot", "late"))
	a.ready.Store(false)
	for _, o := range takenSnapshot("late", "here@s") {
		if err := a.tracker.Add(o); err != nil {
			t.Fatal(err)
		}
	}
	a.ready.Store(true)
	if got := a.patched("restored").GetAnnotations()[selectedNode]; got != "n1" {
		t.Errorf("the node is %q", got)
	}
}

// Contents without a label that name the node's pool get it.
func TestContents(t *testing.T) {
	a := start(t,
		content("snapshot", driver, snapshot.VolumeSnapshotContentSource{SnapshotHandle: new("here@s")}),
		content("volume", driver, snapshot.VolumeSnapshotContentSource{VolumeHandle: new("here")}),
		content("elsewhere", driver, snapshot.VolumeSnapshotContentSource{SnapshotHandle: new("there@s")}),
		content("not-ours", "theirs.example.com", snapshot.VolumeSnapshotContentSource{SnapshotHandle: new("here@s")}),
		content("empty", driver, snapshot.VolumeSnapshotContentSource{}),
	)
	for _, name := range []string{"snapshot", "volume"} {
		if got := a.patched(name).GetLabels()[managedBy]; got != "n1" {
			t.Errorf("content %s has the label %q", name, got)
		}
	}
	a.create("volumesnapshotcontents", content("z-last", driver, snapshot.VolumeSnapshotContentSource{VolumeHandle: new("here")}))
	a.patched("z-last")
	if got, want := a.patches(), []string{"snapshot", "volume", "z-last"}; !slices.Equal(got, want) {
		t.Errorf("patched are %v, want %v", got, want)
	}
}

func (a *api) create(resource string, o runtime.Object) {
	a.Helper()
	accessor, err := meta.Accessor(o)
	if err != nil {
		a.Fatal(err)
	}
	group := core.SchemeGroupVersion
	if resource == "volumesnapshotcontents" {
		group = snapshot.SchemeGroupVersion
	}
	if err := a.tracker.Create(group.WithResource(resource), o, accessor.GetNamespace()); err != nil {
		a.Fatal(err)
	}
}

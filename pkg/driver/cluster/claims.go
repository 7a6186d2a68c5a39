package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
)

// selectedNode is where the scheduler writes which node is to make a claim's volume. A claim that has it already is
// scheduled to that node only.
const selectedNode = "volume.kubernetes.io/selected-node"

// errNotYet is of a source that does not say yet where it is.
var errNotYet = errors.New("the claim's source is not ready")

// claims presets the node of those whose source is in this node's pool.
type claims struct {
	Options
	events  record.EventRecorder
	queue   workqueue.TypedRateLimitingInterface[string]
	claims  corelisters.PersistentVolumeClaimLister
	classes storagelisters.StorageClassLister

	// elsewhere has the pending claims whose source is in another pool: that never changes. Used by reconcile only.
	elsewhere map[string]types.UID
	// presets spaces out repeated presets of a claim: when the pool is full, the provisioner takes them away again.
	presets *flowcontrol.Backoff
}

func newClaims(o Options, events record.EventRecorder) *reconciler {
	claimCache := newCache(o.Core.PersistentVolumeClaims(""), &core.PersistentVolumeClaim{}, "", stripClaim)
	classCache := newCache(o.Storage.StorageClasses(), &storage.StorageClass{}, "", strip)
	c := &claims{
		Options:   o,
		events:    events,
		claims:    corelisters.NewPersistentVolumeClaimLister(claimCache.GetIndexer()),
		classes:   storagelisters.NewStorageClassLister(classCache.GetIndexer()),
		elsewhere: map[string]types.UID{},
		presets:   flowcontrol.NewBackOff(firstRetry, lastRetry),
	}
	r := newReconciler("claims", c.reconcile, claimCache, classCache)
	c.queue = r.queue
	return r
}

// stripClaim keeps of a claim what reconcile looks at: a cluster may have very many.
func stripClaim(object any) (any, error) {
	claim, ok := object.(*core.PersistentVolumeClaim)
	if !ok {
		return strip(object)
	}
	kept := &core.PersistentVolumeClaim{
		ObjectMeta: meta.ObjectMeta{
			Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID, ResourceVersion: claim.ResourceVersion,
			DeletionTimestamp: claim.DeletionTimestamp,
		},
		Spec: core.PersistentVolumeClaimSpec{
			StorageClassName: claim.Spec.StorageClassName, DataSourceRef: claim.Spec.DataSourceRef, VolumeName: claim.Spec.VolumeName,
		},
	}
	if node, ok := claim.Annotations[selectedNode]; ok {
		kept.Annotations = map[string]string{selectedNode: node}
	}
	return kept, nil
}

func (c *claims) reconcile(ctx context.Context, key string) error {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	claim, err := c.claims.PersistentVolumeClaims(namespace).Get(name)
	if err != nil || !c.concerns(claim) { // the only error is that it is gone
		delete(c.elsewhere, key)
		c.presets.DeleteEntry(key)
		return nil //nolint:nilerr // there is nothing to do
	}
	if claim.Annotations[selectedNode] == c.Node || c.elsewhere[key] == claim.UID {
		return nil
	}
	handle, err := c.source(ctx, claim)
	if err != nil {
		return err
	}
	owned, err := c.Owns(handle)
	if err != nil {
		return err
	}
	if !owned {
		c.elsewhere[key] = claim.UID
		return nil
	}
	if now := time.Now(); c.presets.IsInBackOffSinceUpdate(key, now) {
		c.queue.AddAfter(key, c.presets.Get(key))
		return nil
	}
	if err := c.preset(ctx, claim); err != nil {
		return err
	}
	c.presets.Next(key, time.Now())
	return nil
}

// concerns tells whether a claim waits for a volume of ours that is made from a source.
func (c *claims) concerns(claim *core.PersistentVolumeClaim) bool {
	if claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil || claim.Spec.DataSourceRef == nil ||
		claim.Spec.StorageClassName == nil {
		return false
	}
	class, err := c.classes.Get(*claim.Spec.StorageClassName)
	return err == nil && class.Provisioner == c.Driver
}

// source returns the handle of the volume or snapshot that a claim's volume is made from, "" if it is none of this
// driver's. errNotYet.
func (c *claims) source(ctx context.Context, claim *core.PersistentVolumeClaim) (string, error) {
	ref := claim.Spec.DataSourceRef
	if ref.Namespace != nil && *ref.Namespace != claim.Namespace {
		return "", nil // the provisioner refuses it
	}
	switch ref.Kind {
	case "PersistentVolumeClaim":
		return c.volumeHandle(ctx, claim.Namespace, ref.Name)
	case "VolumeSnapshot":
		return c.snapshotHandle(ctx, claim.Namespace, ref.Name)
	default:
		return "", nil
	}
}

func (c *claims) volumeHandle(ctx context.Context, namespace, name string) (string, error) {
	source, err := c.claims.PersistentVolumeClaims(namespace).Get(name)
	if err != nil || source.Spec.VolumeName == "" {
		return "", fmt.Errorf("%w: claim %s has no volume", errNotYet, name)
	}
	volume, err := c.Core.PersistentVolumes().Get(ctx, source.Spec.VolumeName, meta.GetOptions{})
	switch {
	case err != nil:
		return "", fmt.Errorf("volume of claim %s: %w", name, err)
	case volume.Spec.CSI == nil || volume.Spec.CSI.Driver != c.Driver:
		return "", nil
	}
	return volume.Spec.CSI.VolumeHandle, nil
}

func (c *claims) snapshotHandle(ctx context.Context, namespace, name string) (string, error) {
	snapshot, err := c.Snapshots.VolumeSnapshots(namespace).Get(ctx, name, meta.GetOptions{})
	switch {
	case err != nil:
		return "", fmt.Errorf("source: %w", err)
	case snapshot.Status == nil || snapshot.Status.BoundVolumeSnapshotContentName == nil:
		return "", fmt.Errorf("%w: snapshot %s has no content", errNotYet, name)
	}
	content, err := c.Snapshots.VolumeSnapshotContents().Get(ctx, *snapshot.Status.BoundVolumeSnapshotContentName, meta.GetOptions{})
	switch {
	case err != nil:
		return "", fmt.Errorf("content of snapshot %s: %w", name, err)
	case content.Spec.Driver != c.Driver:
		return "", nil
	case content.Status == nil || content.Status.SnapshotHandle == nil:
		return "", fmt.Errorf("%w: snapshot %s is not taken", errNotYet, name)
	}
	return *content.Status.SnapshotHandle, nil
}

// preset writes this node into the claim, also where the scheduler has tried another, unless the claim changed.
func (c *claims) preset(ctx context.Context, claim *core.PersistentVolumeClaim) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": claim.ResourceVersion,
		"annotations":     map[string]string{selectedNode: c.Node},
	}})
	if err != nil {
		return err
	}
	_, err = c.Core.PersistentVolumeClaims(claim.Namespace).
		Patch(ctx, claim.Name, types.MergePatchType, patch, meta.PatchOptions{})
	switch {
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return nil // the change, which brings the claim here again, is on its way
	case err != nil:
		return fmt.Errorf("preset the node: %w", err)
	}
	klog.FromContext(ctx).Info("The claim's source is here: its volume will be, too")
	if other := claim.Annotations[selectedNode]; other != "" {
		c.events.Eventf(claim, core.EventTypeWarning, "NodeOfSource",
			"Node %s was selected, but the source is on node %s, where the volume is made instead", other, c.Node)
	} else {
		c.events.Eventf(claim, core.EventTypeNormal, "NodeOfSource", "The volume is made on node %s, which has its source", c.Node)
	}
	return nil
}

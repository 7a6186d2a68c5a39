package cluster

import (
	"context"
	"encoding/json"
	"fmt"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotlisters "github.com/kubernetes-csi/external-snapshotter/client/v8/listers/volumesnapshot/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
)

// managedBy is the label by which a csi-snapshotter with --node-deployment finds the contents of its node. The
// snapshot-controller sets it on those that it makes, if it is told to; on pre-provisioned ones nobody else does.
const managedBy = "snapshot.storage.kubernetes.io/managed-by"

// contents labels those of this node's pool.
type contents struct {
	Options
	contents snapshotlisters.VolumeSnapshotContentLister // only those without the label
}

func newContents(o Options) *reconciler {
	unlabelled := newCache(o.Snapshots.VolumeSnapshotContents(), &snapshot.VolumeSnapshotContent{}, "!"+managedBy, strip)
	c := &contents{Options: o, contents: snapshotlisters.NewVolumeSnapshotContentLister(unlabelled.GetIndexer())}
	return newReconciler("contents", c.reconcile, unlabelled)
}

func (c *contents) reconcile(ctx context.Context, name string) error {
	content, err := c.contents.Get(name)
	if err != nil || content.Spec.Driver != c.Driver || content.Labels[managedBy] != "" {
		return nil //nolint:nilerr // the only error is that it is gone, or has its label
	}
	if owned, err := c.Owns(handleOf(content)); err != nil || !owned {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": content.ResourceVersion,
		"labels":          map[string]string{managedBy: c.Node},
	}})
	if err != nil {
		return err
	}
	_, err = c.Snapshots.VolumeSnapshotContents().Patch(ctx, name, types.MergePatchType, patch, meta.PatchOptions{})
	switch {
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return nil // the change is on its way here
	case err != nil:
		return fmt.Errorf("label the content: %w", err)
	}
	klog.FromContext(ctx).Info("The snapshot is managed by this node")
	return nil
}

// handleOf returns the handle of a content's snapshot, or of the volume that it is to be taken of.
func handleOf(content *snapshot.VolumeSnapshotContent) string {
	for _, handle := range []*string{content.Spec.Source.SnapshotHandle, content.Spec.Source.VolumeHandle} {
		if handle != nil {
			return *handle
		}
	}
	return ""
}

// Package cluster is what a node's plugin does in the Kubernetes API beside answering CSI calls. A volume or snapshot
// is where its image is, which the scheduler and the snapshot-controller cannot know:
//
//   - A claim whose source is in this node's pool gets this node preset as the one that makes its volume.
//   - A VolumeSnapshotContent whose snapshot, or whose volume, is in this node's pool gets the label by which this
//     node's csi-snapshotter finds its work.
//
// What goes wrong with a volume in use becomes an Event of its claim.
//
// Each node looks after its own pool only, so nodes need no leader. Nothing else in the cluster is changed.
package cluster

import (
	"context"
	"fmt"
	"sync"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	typedsnapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/typed/volumesnapshot/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	typedstorage "k8s.io/client-go/kubernetes/typed/storage/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
)

// Options of a node's part.
type Options struct {
	Clients
	Driver string // the CSI driver's name
	Node   string // the Kubernetes node's name
	// Owns tells whether a volume handle or snapshot handle is of this node's pool. After an error it is asked again.
	Owns func(handle string) (bool, error)
	// Attached returns the volumes that are in use on this node.
	Attached func(context.Context) ([]Volume, error)
}

// Clients of the API groups that are used. Those of all groups together would be most of the program.
type Clients struct {
	Core      typedcore.CoreV1Interface
	Storage   typedstorage.StorageV1Interface
	Snapshots typedsnapshot.SnapshotV1Interface
}

// Connect makes the clients. It does not wait for the API server.
func Connect(config *rest.Config) (c Clients, err error) {
	if c.Core, err = typedcore.NewForConfig(config); err != nil {
		return c, fmt.Errorf("client of the core API: %w", err)
	}
	if c.Storage, err = typedstorage.NewForConfig(config); err != nil {
		return c, fmt.Errorf("client of the storage API: %w", err)
	}
	if c.Snapshots, err = typedsnapshot.NewForConfig(config); err != nil {
		return c, fmt.Errorf("client of the snapshot API: %w", err)
	}
	return c, nil
}

// Run works until ctx ends. While the API server cannot be reached it waits.
func Run(ctx context.Context, o Options) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: o.Core.Events("")})
	events := broadcaster.NewRecorder(newScheme(), core.EventSource{Component: o.Driver, Host: o.Node})

	var group sync.WaitGroup
	defer group.Wait()
	for _, r := range []*reconciler{newClaims(o, events), newContents(o)} {
		group.Go(func() { r.run(ctx) })
	}
	h := &health{Options: o, events: events, before: map[string]Volume{}}
	group.Go(func() { h.run(ctx) })
}

// newScheme knows the kinds that events are about.
func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	// They only fail for types that are registered twice.
	_ = core.AddToScheme(s)
	_ = snapshot.AddToScheme(s)
	return s
}
